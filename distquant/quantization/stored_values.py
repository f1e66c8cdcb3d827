"""Checks of stored values that headers do not show: what a kernel would take for another number than the file means.

A method declares one for each of its components (`Codec.value_checks`), and a load runs it where the component's last
byte has arrived, on each rank for the part that it keeps. Codes are not looked at: every bit pattern is one, and a
float8 NaN is legal as a NaN in an unquantized weight is. What is checked is small beside the codes: scales and the
like, which a kernel multiplies a whole block with. Scales of 0 are legal, they belong to blocks of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distquant.errors import InputError

Check = Callable[[Tensor], str | None]
"""Gets all values of a component that a rank keeps, flat, in the stored dtype; returns what is wrong with them."""

DAMAGED = "The file is damaged, or was written wrongly: download it again, or quantize the original"

NO_EXPONENT = 255
"""The byte that float8_e8m0fnu has for NaN (OCP Microscaling v1.0, 5.4.1)."""

_BITS: Mapping[torch.dtype, tuple[torch.dtype, type[np.unsignedinteger]]] = {
    torch.float32: (torch.int32, np.uint32),
    torch.bfloat16: (torch.int16, np.uint16),
    torch.float16: (torch.int16, np.uint16),
}
"""Integers of the size of a float: torch's, and numpy's without a sign."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """Floats that must be finite; integers have no check here.

    Attributes:
        negative: True if they may be negative.
        zero: True if they may be 0.
    """

    negative: bool = True
    zero: bool = True

    def __call__(self, values: Tensor) -> str | None:
        if not values.numel() or not values.is_floating_point():
            return None
        if values.dtype == torch.float8_e8m0fnu:
            return exponents(values)
        if values.device.type == "cpu" and values.dtype in _BITS and self._pass(values):
            return None
        least, most = values.float().aminmax()  # a NaN anywhere is the result
        low, high = float(least), float(most)
        wrong = low if math.isfinite(high) else high
        fine = math.isfinite(wrong) and (self.negative or wrong > 0 or (wrong == 0 and self.zero))
        return None if fine else f"{wrong:g}, and must be {self._limit}"

    def _pass(self, values: Tensor) -> bool:
        """True if bit patterns already say that nothing is wrong; of floats without a sign, these have their order.

        numpy takes a few microseconds for them. torch would use several threads, and wait for the last one.
        """
        signed, unsigned = _BITS[values.dtype]
        bits = values.view(signed).numpy().view(unsigned)
        infinity = int(torch.tensor(math.inf, dtype=values.dtype).view(signed))
        if self.negative:
            bits = bits & torch.iinfo(signed).max  # without the sign
        return int(bits.max()) < infinity and (self.zero or int(bits.min()) > 0)

    @property
    def _limit(self) -> str:
        if self.negative:
            return "finite"
        return f"finite and {'at least' if self.zero else 'greater than'} 0"


@dataclass(frozen=True, slots=True)
class Integers:
    """Integers from `low` to `high`."""

    low: int
    high: int

    def __call__(self, values: Tensor) -> str | None:
        if not values.numel():
            return None
        on_cpu = values.device.type == "cpu"
        least, most = map(int, _bounds(values.numpy()) if on_cpu else values.aminmax())
        if self.low <= least and most <= self.high:
            return None
        limit = f"from {self.low} to {self.high}" if self.low < self.high else str(self.low)
        return f"{least if least < self.low else most}, and must be {limit}"


FINITE = Numbers()
"""For scales and zero points that may have either sign: AutoRound and GGUF have negative scales."""
MAGNITUDES = Numbers(negative=False)
"""For scales that are largest magnitudes, or such divided by a constant."""
DIVISORS = Numbers(negative=False, zero=False)
"""For scales that activations are divided by."""


def exponents(values: Tensor) -> str | None:
    """Powers of two as bytes: every exponent but the one that means NaN, which kernels take for 2^128."""
    codes = values.view(torch.uint8)
    if not values.numel() or int(codes.numpy().max() if codes.device.type == "cpu" else codes.max()) < NO_EXPONENT:
        return None
    return f"the exponent {NO_EXPONENT}, which is NaN, and must be at most {NO_EXPONENT - 1}"


def integers_of(bits: int) -> Integers:
    """Signed integers of so many bits."""
    return Integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def table(expected: Callable[[torch.device], Tensor], whose: str) -> Check:
    """A table that a kernel has built in: a stored one must be that, up to the last bits of another machine.

    Args:
        expected: gives it, on a device.
        whose: names the table in the message.
    """

    def check(values: Tensor) -> str | None:
        own = expected(values.device)
        if torch.equal(values, own) or torch.allclose(values, own, rtol=1e-4, atol=1e-6):
            return None
        wrong = ~torch.isclose(values, own, rtol=1e-4, atol=1e-6)
        place = int(wrong.nonzero()[0])
        return f"{float(values[place]):g} at {place}, and must be {whose} table, which has {float(own[place]):g} there"

    return check


def check_values(name: str, component: str, check: Check | None, values: Tensor) -> None:
    """Raises `InputError` where a component of the parameter of this name fails its check."""
    fault = None if check is None else check(values)
    if fault is not None:
        raise InputError.one(name, f"{component or 'weight'} holds {fault}", DAMAGED)


def _bounds(values: np.ndarray) -> tuple[Any, Any]:
    return values.min(), values.max()
