"""The place of a pattern in a quantization config, for messages about a pattern that matches too slowly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from distquant.config.base import QuantizationConfig
from distquant.config.checks import where

KINDS = ("re:", "-:", "+:")
"""Prefixes that compressed-tensors and GPTQModel write before a pattern."""


def places_of(config: QuantizationConfig) -> Callable[[str], str]:
    """Returns a function that names the field of a configuration in which a pattern stands."""

    def place(pattern: str) -> str:
        texts = [(name, _bare(text)) for name, value in config.to_dict().items() for text in _texts(value)]
        exact = [name for name, text in texts if text == pattern]
        # Some methods put more around a pattern before it is matched.
        around = [name for name, text in texts if text and text in pattern]
        return next((where(name) for name in (*exact, *around)), "quantization_config")

    return place


def _bare(text: str) -> str:
    for kind in KINDS:
        text = text.removeprefix(kind)
    return text


def _texts(value: Any) -> Iterator[str]:
    """Yields all texts in a value, the keys of mappings among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
