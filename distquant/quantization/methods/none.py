"""No quantization: weights stay in the dtype that they are loaded in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from distquant.config import NoneConfig
from distquant.model.description import ModelDescription
from distquant.quantization.registry import register
from distquant.quantization.scheme import Scheme
from distquant.sharding.layout import Layout, plain


@register
class NoneScheme(Scheme):
    """Layout rules alone: it converts no module."""

    name = "none"
    config_class = NoneConfig
    unmoved: ClassVar[Mapping[str, str]] = {}

    def select_modules(self, description: ModelDescription) -> list[str]:
        return []

    def layout(self, name: str, shape: tuple[int, ...], dtype: str) -> Layout:
        return plain(dtype, len(shape))
