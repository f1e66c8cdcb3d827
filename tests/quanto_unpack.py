"""optimum-quanto compiles its unpacking for CPUs when it is first needed, which takes up to 90 s: here it is torch.

The definition is that of `library/unpack.py` in quanto 0.2.7. Import for the effect, in every module whose tests unpack
4 or 2 bits by quanto, so that ranks have it too.
"""

from types import SimpleNamespace

import torch
from optimum.quanto.library.extensions.cpp import ext
from torch import Tensor


def unpack(packed: Tensor, bits: int) -> Tensor:
    """uint8 `[n * rows, columns]` of `[rows, columns]`: first all lowest bits, then the next ones."""
    return torch.cat([packed >> shift & ((1 << bits) - 1) for shift in range(0, 8, bits)])


ext._lib = SimpleNamespace(unpack=unpack)
