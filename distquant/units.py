"""Sizes in bytes, read from text and written as text."""

from __future__ import annotations

import re
import reprlib
from decimal import Decimal

from distquant.errors import InputError

MOST_BYTES = 1 << 63
"""Limit of every size: offsets and lengths of files and memory are signed numbers of 64 bits."""

LEAST_BYTES = 1024
"""A smaller number without a unit is not taken for bytes: 24 may mean 24 GiB."""

_SUFFIX = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGTP", 1):
    _SUFFIX[_letter] = _SUFFIX[_letter + "B"] = 1000**_power
    _SUFFIX[_letter + "I"] = _SUFFIX[_letter + "IB"] = 1024**_power


def parse_bytes(text: str | int, where: str = "size") -> int:
    """Returns the bytes that are meant by `24GiB`, `512MiB`, `80GB` or a plain number of bytes.

    Units may be written in any case and without the `B`: `24g` and `24G` are 24 GB, `24Gi` is 24 GiB.

    Raises:
        InputError: an invalid size, or a small number without a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", "" if isinstance(text, bool) else str(text))
    if not match or match.group(2).upper() not in _SUFFIX:
        raise InputError.one(where, f"invalid size {text!r}", "Write it as 24GiB, 512MiB, 80GB or a number of bytes")
    number, unit = match.group(1), match.group(2).upper()
    size = Decimal(number) * _SUFFIX[unit]
    if not unit and 0 < size < LEAST_BYTES:
        raise InputError.one(where, f"{number} has no unit", f"Write {number}GiB, {number}MiB, or {number}B for bytes")
    if size >= MOST_BYTES:
        fault = f"{reprlib.repr(str(text))} is more than any machine has: a size is below {MOST_BYTES} bytes"
        raise InputError.one(where, fault, "Write it as 24GiB, 512MiB, 80GB or a number of bytes")
    return int(size)


def format_bytes(count: float) -> str:
    """Returns `count` bytes in the largest binary unit that keeps at least one digit before the point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"
