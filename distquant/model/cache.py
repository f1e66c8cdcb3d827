"""The cache that a model keeps while it generates, as plain data: a row for each layer, and sizes of its activations.

Kinds of layers are those of `DynamicCache` (`transformers/cache_utils.py` 5.23), sizes those of the attention modules:

    full attention     keys and values of every token, `kv_heads * (head_dim + v_head_dim)`
    sliding window     the same, of the last `window - 1` tokens
    latent (MLA)       `kv_lora_rank + qk_rope_head_dim` a token; versions without `expand_kv` keep all heads expanded
    linear attention   states of one size, whatever the context: the inputs of the convolution and the recurrent state
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOAT32 = 4
"""Bytes of an element of a recurrent state, which most models keep in float32."""

UNREADABLE = (LookupError, AttributeError, TypeError, ValueError)
"""Errors of transformers for a configuration that its cache does not know."""

RECURRENT_SHAPES = (
    ("num_v_heads", "head_k_dim", "head_v_dim"),
    ("num_heads", "head_dim", "ssm_state_size"),
    ("intermediate_size", "ssm_state_size"),
)
"""Attributes of a linear-attention module that give its recurrent state: gated delta nets, Mamba-2, Mamba."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayer:
    """The cache of one layer.

    Attributes:
        module: path of the module that fills it.
        heads: kv heads, which tensor parallelism divides.
        head_width: elements that a head keeps of a token, keys and values together.
        shared_width: elements of a token that every rank keeps, however heads are divided.
        window: tokens that are kept at most; None = all.
        state: elements of a sequence, whatever its length, in the model's dtype.
        float_state: the same in float32.
    """

    module: str
    heads: int = 0
    head_width: int = 0
    shared_width: int = 0
    window: int | None = None
    state: int = 0
    float_state: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """Sizes of a model that decide the memory of generation.

    Attributes:
        layers: that have a cache.
        unknown: modules whose cache is not known, so that it is not counted.
        hidden_size: features between layers.
        vocab_size: entries of the vocabulary.
        experts_per_token: experts that a token is sent to; 1 without experts.
        longest: tokens of the longest context that the configuration names.
    """

    layers: tuple[CacheLayer, ...]
    unknown: tuple[str, ...]
    hidden_size: int
    vocab_size: int
    experts_per_token: int = 1
    longest: int | None = None


def describe_decoder(model: PreTrainedModel) -> Decoder | None:
    """Describes the cache of a model on `meta`; None where transformers' cache does not know the configuration."""
    from transformers import DynamicCache

    config = model.config.get_text_config(decoder=True)
    try:
        kinds = DynamicCache(config=model.config).layers
        hidden, vocab = int(config.hidden_size), int(config.vocab_size)
    except UNREADABLE:
        return None
    modules = dict(_modules(model, config))
    layers, unknown = list[CacheLayer](), list[str]()
    for number, kind in enumerate(kinds):
        if type(kind).__name__ == "DummyLayer":
            continue
        layer = next((found for each in modules.get(number, ()) if (found := _layer(*each, kind, config))), None)
        if layer is not None:
            layers.append(layer)
        elif not any(getattr(module, "is_kv_shared_layer", False) for _, module in modules.get(number, ())):
            unknown.append(f"layer {number}")
    return Decoder(
        layers=tuple(layers),
        unknown=tuple(unknown),
        hidden_size=hidden,
        vocab_size=vocab,
        experts_per_token=_whole(config, "num_experts_per_tok") or 1,
        longest=_whole(config, "max_position_embeddings") or _whole(config, "n_positions"),
    )


def _modules(model: PreTrainedModel, config: Any) -> Iterator[tuple[int, list[tuple[str, Any]]]]:
    """Yields the number of each layer of the decoder, and its modules that know it: attention, or what replaces it."""
    found: dict[int, list[tuple[str, Any]]] = {}
    for name, module in model.named_modules():
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int) and getattr(module, "config", config) is config:
            found.setdefault(number, []).append((name, module))
    yield from found.items()


def _layer(name: str, module: Any, kind: Any, config: Any) -> CacheLayer | None:
    """Returns the cache that a module fills; None if it fills none, or its sizes are not known."""
    if getattr(module, "is_kv_shared_layer", False):
        return None
    linear = "LinearAttention" in type(kind).__name__
    if linear and (states := _states(name, module)) is not None:
        return states
    window = getattr(kind, "sliding_window", None) if getattr(kind, "is_sliding", False) else None
    indexer = _whole(config, "index_head_dim") or 0 if "Indexed" in type(kind).__name__ else 0
    rank, rope = _whole(module, "kv_lora_rank"), _whole(module, "qk_rope_head_dim")
    if rank and rope:
        if hasattr(module, "expand_kv"):
            return CacheLayer(module=name, shared_width=rank + rope + indexer, window=window)
        width = (_whole(module, "qk_head_dim") or 0) + (_whole(module, "v_head_dim") or 0)
        heads = _whole(config, "num_attention_heads") or 0
        return CacheLayer(module=name, heads=heads, head_width=width, shared_width=indexer, window=window)
    size = _whole(module, "head_dim") or _whole(module, "head_size")
    kv = _kv_heads(module, config, size)
    if not size or not kv:
        return None
    width = size + (_whole(module, "v_head_dim") or size)
    return CacheLayer(module=name, heads=kv, head_width=width, shared_width=indexer, window=window)


def _kv_heads(module: Any, config: Any, size: int | None) -> int | None:
    """Returns the kv heads of an attention module: by its own projection, else as the configuration has them."""
    projection = getattr(module, "k_proj", None)
    if projection is not None and size and hasattr(projection, "out_features"):
        return int(projection.out_features) // size
    heads, groups = _whole(config, "num_attention_heads"), _whole(module, "num_key_value_groups")
    if heads and groups:
        return heads // groups
    return _whole(module, "num_key_value_heads") or _whole(config, "num_key_value_heads") or heads


def _states(name: str, module: Any) -> CacheLayer | None:
    """Returns the states of a linear-attention or convolution module."""
    convolution = getattr(module, "conv1d", None)
    convolution = getattr(module, "conv", None) if convolution is None else convolution
    weight = getattr(convolution, "weight", None)
    if weight is None:
        return None
    recurrent = 0
    for names in RECURRENT_SHAPES:
        sizes = [_whole(module, each) for each in names]
        if all(sizes):
            recurrent = math.prod(each for each in sizes if each)
            break
    return CacheLayer(module=name, state=weight.shape[0] * weight.shape[-1], float_state=recurrent)


def _whole(owner: Any, name: str) -> int | None:
    """Returns an attribute that is a whole number above 0, else None."""
    value = getattr(owner, name, None)
    return value if isinstance(value, int) and value > 0 else None
