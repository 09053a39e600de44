"""The guides' first usages, as they stand there: whole loops, to be pasted.

python tests/usages.py nnx > usage.py
"""

import re
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {"tunix": "trainers", "nnx": "nnx", "linen": "linen", "hugging_face": "hugging-face"}


def fences(page: Path) -> list[str]:
    """The blocks of Python of a page, in their order."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


USAGES = {name: fences(DOCS / f"{page}.md")[0] for name, page in PAGES.items()}

if __name__ == "__main__":
    print(USAGES[sys.argv[1]], end="")
