"""How a load runs, as far as that changes no bit of its result: such options are no part of the plan."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from distquant.errors import Problems

if TYPE_CHECKING:
    import torch

IO_MODES = ("auto", "buffered", "direct")
"""By measurement, through the page cache, past it."""


class Forward(str, Enum):
    """How weights are multiplied that are kept as their format stores them."""

    AUTO = "auto"
    """On a GPU in float8, where the method means activations to be float8, too, and by those of gptqmodel's kernels
    that leave the stored words as they are; else dequantized."""
    DEQUANTIZE = "dequantize"
    """The weight is dequantized, and multiplied with the activations as they are."""
    FLOAT8 = "float8"
    """In float8 on any device (on a CPU torch computes the same, slowly)."""
    GPTQMODEL = "gptqmodel"
    """By the fastest of gptqmodel's kernels for the layouts of GPTQ and AWQ; it may keep the stored words to itself."""

    def tries(self, way: Forward, device: torch.device) -> bool:
        """Whether this way is tried on a device: where it is asked for, and by itself on a GPU."""
        return self is way or (self is Forward.AUTO and device.type == "cuda")


FORWARDS = tuple(each.value for each in Forward)


class LoadProgress(NamedTuple):
    """How far one rank is."""

    done: int = 0
    """Bytes of rows taken so far."""
    total: int = 0
    """Bytes of rows that this rank reads in all; 0 = not known yet."""
    limit: str = ""
    """The stage that holds it back."""


Progress = Callable[[LoadProgress], None]
"""Called as rows arrive."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Choices of one load."""

    kernel: str = "auto"
    """Which kernels quantize: `auto`, `reference`, `cpu`, `triton` or `bitsandbytes`."""
    forward: str = "auto"
    """How stored weights are multiplied: `auto`, `dequantize`, `float8` or `gptqmodel`; of no consequence to them."""
    io: str = "auto"
    """How files are read: through the page cache (`buffered`), past it (`direct`), or by measurement (`auto`)."""
    trace: str | None = None
    """File to write a Chrome trace of all ranks' stages to."""
    timeout: float | None = None
    """Seconds that a rank waits for the others."""

    def __post_init__(self) -> None:
        """Raises `InputError` with every option that cannot work."""
        problems = Problems()
        if self.forward not in FORWARDS:
            problems.add("forward", f"{self.forward!r} is no way to multiply", f"Choose one of: {', '.join(FORWARDS)}")
        if self.io not in IO_MODES:
            problems.add("io", f"{self.io!r} is no way to read", f"Choose one of: {', '.join(IO_MODES)}")
        if self.trace is not None and not os.path.isdir(os.path.dirname(os.path.abspath(self.trace))):
            problems.add("trace", f"{self.trace}: there is no such folder", "Give a file in a folder that exists")
        if self.timeout is not None and not self.timeout > 0:
            problems.add("timeout", f"{self.timeout} is no time to wait", "Give a number of seconds above 0")
        problems.raise_if_any()
