"""GGUF files as transformers reads them: the model's configuration, its tensors' names, and rows in another order.

The names are transformers' own mapping (`get_gguf_hf_weights_map`, 5.23 `modeling_gguf_pytorch_utils.py`). Where it
changes values on the way (its `TENSOR_PROCESSORS`), only llama's is followed here: llama.cpp stores the rows of q and k
with the two halves of each head interleaved, for its rotary embedding, and they are put back.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distquant.checkpoint.gguf import SUFFIX
from distquant.errors import InputError
from distquant.model.description import ModelDescription, Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FOLLOWED = "llama"
"""The only architecture whose conversion is followed; those without any need none."""


@dataclass(frozen=True, slots=True)
class GgufNames:
    """Where the tensors of a file go.

    Attributes:
        params: tensor of the file -> parameter.
        interleaved: parameter -> rows of a head whose halves are stored interleaved.
    """

    params: dict[str, str]
    interleaved: dict[str, int]


def source_of(path: str | os.PathLike[str]) -> tuple[str, dict[str, str]]:
    """What transformers' `from_pretrained` wants for a checkpoint: a folder, and the `gguf_file` in it if it is one."""
    found = Path(path)
    if found.suffix == SUFFIX:
        return str(found.parent), {"gguf_file": found.name}
    return str(path), {}


def gguf_names(model: PreTrainedModel, tensors: Mapping[str, Any], architecture: str) -> GgufNames:
    """Maps the tensors of a file to a model on `meta`.

    Raises:
        InputError: the architecture's weights are changed on the way in a form that is not followed here.
    """
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    if architecture in TENSOR_PROCESSORS and architecture != FOLLOWED:
        what = f"{architecture!r} weights are stored in another form than {type(model).__name__} holds them"
        raise InputError.one("general.architecture", what, "Load the safetensors version of this model")
    known = get_gguf_hf_weights_map(model, TensorProcessor())
    params = {name: known[name] for name in tensors if name in known}
    heads: dict[str, int] = {}
    if architecture == FOLLOWED:
        config: Any = model.config
        kv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        heads = {".attn_q.": config.num_attention_heads, ".attn_k.": kv}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    interleaved = {
        param: shapes[param][0] // count
        for name, param in params.items()
        for part, count in heads.items()
        if part in name and param in shapes
    }
    return GgufNames(params, interleaved)


def with_gguf_sources(description: ModelDescription, names: GgufNames) -> ModelDescription:
    """A skeleton that was built with the parameters' names, with those of the file's tensors as sources."""
    stored = {param: name for name, param in names.params.items()}
    sources = {
        name: tuple(Source(stored.get(source.tensor, source.tensor)) for source in found)
        for name, found in description.sources.items()
    }
    return replace(description, sources=sources)
