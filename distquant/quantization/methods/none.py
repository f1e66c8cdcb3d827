"""No quantization: weights stay in the dtype that they are loaded in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from distquant.config import NoneConfig
from distquant.model.description import ModelDescription
from distquant.quantization.registry import register
from distquant.quantization.scheme import Scheme
from distquant.sharding.layout import Layout, plain
from distquant.sharding.shard import Shard

if TYPE_CHECKING:
    from torch import Tensor, nn


@register
class NoneScheme(Scheme):
    """Converts no module, so only its layout is ever asked for."""

    name = "none"
    config_class = NoneConfig
    unmoved: ClassVar[Mapping[str, str]] = {}

    def select_modules(self, description: ModelDescription) -> list[str]:
        return []

    def layout(self, name: str, shape: tuple[int, ...], dtype: str) -> Layout:
        return plain(dtype, len(shape))

    def module(self, linear: nn.Module, shard: Shard) -> nn.Module:
        raise AssertionError("the scheme `none` converts no module")

    def encode(self, name: str, rows: Tensor, out: dict[str, Tensor], ops: Any) -> None:
        raise AssertionError("the scheme `none` converts no module")

    def load_encoded(self, shard: Shard, module: nn.Module, parts: dict[str, Tensor], ops: Any) -> None:
        raise AssertionError("the scheme `none` converts no module")
