"""README.md's usages, as they stand there.

python tests/readme.py nnx > usage.py
"""

import re
import sys
from pathlib import Path

TEXT = (Path(__file__).parents[1] / "README.md").read_text()
NAMES = ("tunix", "nnx", "linen", "hugging_face")
USAGES = dict(zip(NAMES, re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL), strict=True))

if __name__ == "__main__":
    print(USAGES[sys.argv[1]], end="")
