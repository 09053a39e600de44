"""Files of safetensors as PyTorch tensors that own their memory.

`safetensors.torch.load_file` of release 0.7 leaves them in the file: they die, and the process with
them, when a test writes that file anew.
"""

from pathlib import Path

import torch
from safetensors.torch import load


def load_file(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, by their keys."""
    return load(Path(file).read_bytes())
