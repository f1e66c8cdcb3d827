"""Numbers of a model's configuration, compared with the checkpoint's tensors before anything is made in that number.

transformers makes what a configuration asks for: a billion layers take all time and memory. A checkpoint has a tensor
or more for each layer, and for each expert a tensor or a place in one, so its headers say how many there can be.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distquant.errors import Problem

MOST = 1 << 63
"""Limit of every whole number: sizes in torch are signed numbers of 64 bits."""

ALLOWED = 1000
"""Layers or experts that a configuration may name without a tensor for each: that takes a second, and what they lack is
reported with their names."""

LAYERS = re.compile(r"(?:^|_)(?:layers?|blocks|block_count|depth)$")
"""Last key of a count of layers: `num_hidden_layers`, `n_layer`, `decoder_layers`, GGUF's `block_count`."""

EXPERTS = re.compile(r"(?:^|_)(?:num|n|local|routed|moe)_.*experts$|^experts$|(?:^|_)expert_count$")
"""Last key of a count of experts: `num_experts`, `n_routed_experts`, GGUF's `expert_count`."""

POSITIVE = ("factor", "rope_theta", "original_max_position_embeddings")
"""Keys of rotary embeddings that a position is divided by, or a power is taken of."""

SIZES = re.compile(
    r"(?:text_config\.)?"
    r"(?:num_hidden_layers|n_layers?|vocab_size|hidden_size|num_attention_heads|max_position_embeddings)"
    r"|[\w-]+\.block_count"
)
"""Sizes that each model has: in config.json or its part for text, or in a GGUF file."""

CHECK = "Check that {file} belongs to these tensors, and was not changed"


def number_problems(config: Mapping[str, Any], tensors: Mapping[str, Sequence[int]], file: str) -> Iterator[Problem]:
    """Yields the numbers of a configuration that cannot be the model's of these tensors.

    Args:
        config: the parsed config.json, or values of a GGUF file by key.
        tensors: shape of each checkpoint tensor.
        file: name of the file that has the numbers, for messages.
    """
    layers = len(tensors) + ALLOWED
    experts = max(layers, max((dim for shape in tensors.values() for dim in shape), default=0))
    fix = CHECK.format(file=file)
    for path, value in _numbers(config, ""):
        where, key = f"{file}: {path}", path.rpartition(".")[2]
        if isinstance(value, float):
            if math.isnan(value) or ("rope" in path and math.isinf(value)):
                yield Problem(where, f"{value} is not finite", fix)
            elif "rope" in path and key in POSITIVE and value <= 0:
                yield Problem(where, f"{value} is not above 0", fix)
        elif abs(value) >= MOST:
            yield Problem(where, f"{_short(value)} is not between -2^63 and 2^63", fix)
        elif value <= 0 and SIZES.fullmatch(path):
            yield Problem(where, f"{value} is not above 0", fix)
        elif LAYERS.search(key) and value > layers:
            fault = f"{value} layers, and the checkpoint has {len(tensors)} tensors (at most {layers} are built)"
            yield Problem(where, fault, fix)
        elif EXPERTS.search(key) and value > experts:
            fault = f"{value} experts, and no tensor of the checkpoint has room for more than {experts}"
            yield Problem(where, fault, fix)
        elif "rope" in path and key in POSITIVE and value <= 0:
            yield Problem(where, f"{value} is not above 0", fix)


def _numbers(value: Any, path: str) -> Iterator[tuple[str, int | float]]:
    """Yields the numbers in a configuration, with dotted paths; of a list the path is the list's."""
    waiting = [(path, value)]  # not recursive: JSON may be nested more deeply than calls
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(f"{path}.{key}" if path else str(key), item) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            waiting += [(path, item) for item in value]
        elif type(value) in (int, float):
            yield path, value


def _short(number: int) -> str:
    """Writes a number in bounded length; of thousands of digits Python refuses to write them."""
    return str(number) if abs(number) < 10**30 else f"a number of {math.floor(math.log10(abs(number))) + 1} digits"
