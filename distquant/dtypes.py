"""Dtypes by their names in safetensors and in torch, and their sizes.

Torch is not imported: planning needs names and sizes only.
"""

from __future__ import annotations

_TABLE: tuple[tuple[str, str | None, int], ...] = (
    ("BOOL", "bool", 8),
    ("U8", "uint8", 8),
    ("I8", "int8", 8),
    ("I16", "int16", 16),
    ("I32", "int32", 32),
    ("I64", "int64", 64),
    ("F16", "float16", 16),
    ("BF16", "bfloat16", 16),
    ("F32", "float32", 32),
    ("F64", "float64", 64),
    ("F8_E4M3", "float8_e4m3fn", 8),
    ("F8_E5M2", "float8_e5m2", 8),
    ("F8_E8M0", "float8_e8m0fnu", 8),
    ("F4", None, 4),
    ("F6_E2M3", None, 6),
    ("F6_E3M2", None, 6),
    ("F8_E4M3FNUZ", None, 8),
    ("F8_E5M2FNUZ", None, 8),
    ("U16", None, 16),
    ("U32", None, 32),
    ("U64", None, 64),
    ("C64", None, 64),
)
"""Name in safetensors 0.8 (`Dtype` in tensor.rs), name in torch, and bits of one element.

None in place of torch's name: a header may hold it, but no weight is loaded from it. Elements below a byte are packed.
"""

DTYPE_BITS = {stored: bits for stored, _, bits in _TABLE}
"""Bits of one element, by safetensors' name."""

TORCH_NAMES = {stored: name for stored, name, _ in _TABLE if name is not None}
"""Torch's name by safetensors' name, for the dtypes that are loaded."""

STORED_NAMES = {name: stored for stored, name in TORCH_NAMES.items()}
"""Safetensors' name by torch's name."""

DTYPE_BYTES = {name: DTYPE_BITS[stored] // 8 for stored, name in TORCH_NAMES.items()}
"""Bytes of one element, by torch's name."""

LOAD_DTYPES = ("bfloat16", "float16", "float32")
"""Dtypes that a model can be loaded in."""

STORED_FLOATS = {STORED_NAMES[name]: name for name in LOAD_DTYPES}
"""Torch's name of each of them, by safetensors' name."""

DTYPE_SPELLINGS = {
    **dict.fromkeys(("bf16", "b16"), "bfloat16"),
    **dict.fromkeys(("fp16", "f16", "half"), "float16"),
    **dict.fromkeys(("fp32", "f32", "float", "single"), "float32"),
}
"""Other names of these, in lower case."""


def dtype_name(dtype: object) -> str:
    """Returns torch's name of a dtype that is given as an object or in one of its spellings, else the text itself."""
    name = str(dtype).strip().lower().removeprefix("torch.")
    return DTYPE_SPELLINGS.get(name, name)
