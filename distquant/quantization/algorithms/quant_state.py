"""The `quant_state` of a weight that bitsandbytes has stored in 4 bits: JSON, as bytes of a tensor beside its codes.

`QuantState.as_dict` writes it (bitsandbytes 0.50, `functional.py`): quant_type, blocksize, dtype and shape; with double
quantization nested_blocksize, nested_dtype and nested_offset, too. Another program may have written anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from distquant.errors import InputError, Problem
from distquant.quantization.algorithms.nested_absmax import BLOCK, SECOND
from distquant.quantization.stored_values import DAMAGED
from distquant.tables import printable

LONGEST = 4096
"""Bytes; bitsandbytes writes about 200."""
DTYPES = ("float16", "bfloat16", "float32")
"""Dtypes that a weight can have been quantized from."""
SHOWN = 60
"""Characters of a wrong value that a message shows."""

CONTRADICTS = "The checkpoint contradicts its config; quantize it again"


def read_state(name: str, stored: Tensor, quant_type: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns the state of the weight of this name; see above.

    Args:
        name: of the parameter.
        stored: uint8, the state's bytes.
        quant_type: that the configuration says.
        shape: that the model says.

    Raises:
        InputError: it cannot be read, or says something else, with everything that is wrong.
    """
    try:
        state = json.loads(bytes(stored.tolist()).decode())
    except (ValueError, RecursionError) as error:
        reason = "is nested too deeply" if isinstance(error, RecursionError) else f"is not JSON ({error})"
        raise InputError.one(name, f"its quant_state {reason}", DAMAGED) from error
    if not isinstance(state, dict):
        raise InputError.one(name, f"its quant_state is {_shown(state)}, not a JSON object", DAMAGED)
    problems = list(_problems(name, state, {"quant_type": quant_type, "blocksize": BLOCK, "shape": list(shape)}))
    if problems:
        raise InputError(problems)
    return state


def is_nested(state: Mapping[str, Any]) -> bool:
    """True if absmax are quantized, too."""
    return "nested_offset" in state


def _problems(name: str, state: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[Problem]:
    if any(key.startswith("nested_") for key in state):
        expected = {**expected, "nested_blocksize": SECOND, "nested_dtype": "float32"}
    missing = [key for key in (*expected, "dtype") if key not in state]
    if missing:
        yield Problem(name, f"its quant_state lacks {', '.join(missing)}", DAMAGED)
    for key, value in expected.items():
        if key in state and not _same(state[key], value):
            yield Problem(name, f"its quant_state has {key}={_shown(state[key])}, expected {value!r}", CONTRADICTS)
    dtype = state.get("dtype", DTYPES[0])
    if not isinstance(dtype, str) or dtype not in DTYPES:
        yield Problem(name, f"its quant_state has dtype={_shown(dtype)}, expected one of {', '.join(DTYPES)}", DAMAGED)
    if "nested_blocksize" in expected:
        offset = state.get("nested_offset")
        if isinstance(offset, bool) or not isinstance(offset, (int, float)) or not _finite(offset):
            fault = f"its quant_state has nested_offset={_shown(offset)}, expected a finite float32"
            yield Problem(name, fault, DAMAGED)


def _same(stored: Any, expected: Any) -> bool:
    """True if they are equal and of one type: for Python, `true` and 1.0 are 1."""
    if isinstance(expected, list):
        pairs = list(zip(stored, expected, strict=False)) if isinstance(stored, list) else []
        return isinstance(stored, list) and len(stored) == len(expected) and all(_same(*pair) for pair in pairs)
    return type(stored) is type(expected) and bool(stored == expected)


def _finite(number: float) -> bool:
    """True if it is a number that float32 holds."""
    return abs(number) < 2.0**128  # of NaN, no comparison is true


def _shown(value: Any) -> str:
    """A value as it is in the file, its first characters."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        text = "what cannot be shown"
    return printable(text if len(text) <= SHOWN else text[:SHOWN] + "...")
