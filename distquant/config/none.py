"""No quantization: the weights stay in the load dtype."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from distquant.config.base import QuantizationConfig
from distquant.config.checks import where
from distquant.config.plain import plain
from distquant.errors import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class NoneConfig(QuantizationConfig):
    """Quantizes nothing. Not a method of transformers: a model loaded with it lacks a `quantization_config`.

    `{"dequantize": true}` alone means the same: unquantized weights, whatever the checkpoint stores.
    """

    quant_method: ClassVar[str] = "none"
    short_names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"none": {}}

    @classmethod
    def matches(cls, given: Mapping[str, Any]) -> bool:
        return plain(given.get("quant_method")) == cls.quant_method or dict(given) == {"dequantize": True}

    def _value_problems(self) -> Iterable[Problem]:
        for name in ("include_modules", "layers"):
            if getattr(self, name) is not None:
                reason = f"{getattr(self, name)!r} selects modules, but 'none' quantizes nothing"
                yield Problem(where(name), reason, "Remove it, or choose a quantization method.")
