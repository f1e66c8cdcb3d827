"""The old name of `distquant.quantization`, for one release: schemes that were written for 0.1 work as they are.

`Scheme` here is the base class of 0.1. Its subclasses may override methods under their old names, and each such name is
reported by a warning that names the new one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distquant import quantization
from distquant.old_names import warn_old_name
from distquant.quantization import Encoder, PlainDecoder, QuantizedScheme

_UNCHANGED = ("SCHEMES", "Context", "Shard", "config_classes", "register", "scheme_for")

RENAMED = {
    "converts": "select_modules",
    "flowing": "encoded_components",
    "statistics": "replicated_components",
    "entire": "whole_weight_workspace",
    "decodes": "plain_row_block",
    "complete": "load_encoded",
    "restore": "load_prequantized",
    "adopt": "pack_prequantized",
    "streams": "fingerprint_streams",
}
"""Methods of 0.1 -> their names now."""


def _absent(name: str) -> Callable[..., Any]:
    """A method that a scheme of 0.1 need not have, and that raises where it is needed all the same."""

    def method(self: Any, *arguments: Any) -> Any:
        raise NotImplementedError(f"{self.name}, a scheme written for 0.1, has no {name}")

    return method


class _Scheme(QuantizedScheme, Encoder, PlainDecoder):
    """The one base class that schemes had up to 0.1."""

    fill = _absent("fill")
    components = _absent("components")
    dequantize = _absent("dequantize")
    fingerprint_streams = _absent("fingerprint_streams")
    decode = _absent("decode")

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for old, new in RENAMED.items():
            if old in cls.__dict__:
                warn_old_name(f"{cls.__module__}.{cls.__qualname__}.{old}", new)
                if new not in cls.__dict__:
                    setattr(cls, new, cls.__dict__[old])

    @classmethod
    def reads_stored(cls) -> bool:
        return cls.load_prequantized is not QuantizedScheme.load_prequantized


for _old, _new in RENAMED.items():  # for `super().converts(...)`, and for calls of what a scheme does not override
    setattr(_Scheme, _old, getattr(_Scheme, _new))


def __getattr__(name: str) -> Any:
    if name == "Scheme":
        warn_old_name("distquant.schemes.Scheme", "distquant.quantization.QuantizedScheme (with Encoder)")
        return _Scheme
    if name in _UNCHANGED:
        warn_old_name(f"distquant.schemes.{name}", f"distquant.quantization.{name}")
        return getattr(quantization, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
