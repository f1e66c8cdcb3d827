"""GGUF files as transformers reads them: the model's configuration, its tensors' names, and rows in another order.

The names are transformers' own mapping (`get_gguf_hf_weights_map`, 5.23 `modeling_gguf_pytorch_utils.py`). Its
`TENSOR_PROCESSORS` also change values; of them only llama's is followed here. llama.cpp stores the rows of q and k with
the two halves of each head interleaved, for its rotary embedding; they are restored to the model's order.
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
"""The only architecture whose conversion is followed; most architectures have none."""


@dataclass(frozen=True, slots=True)
class GgufNames:
    """The parameters that the tensors of a file fill.

    Attributes:
        params: tensor of the file -> parameter.
        interleaved: parameter -> rows of a head, for parameters stored with the halves of each head interleaved.
    """

    params: dict[str, str]
    interleaved: dict[str, int]


def source_of(path: str | os.PathLike[str]) -> tuple[str, dict[str, str]]:
    """Returns the arguments of transformers' `from_pretrained` for a checkpoint: a folder, and a `gguf_file` in it."""
    file = Path(path)
    if file.suffix == SUFFIX:
        return str(file.parent), {"gguf_file": file.name}
    return str(path), {}


def gguf_names(model: PreTrainedModel, tensors: Mapping[str, Any], architecture: str) -> GgufNames:
    """Maps the tensors of a file to a model on `meta`.

    Raises:
        InputError: transformers converts the architecture's weights in a way that is not followed here.
    """
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    if architecture in TENSOR_PROCESSORS and architecture != FOLLOWED:
        reason = f"{architecture!r} weights are stored in another form than {type(model).__name__} has"
        raise InputError.one("general.architecture", reason, "Load the safetensors version of this model")
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
    """Replaces the parameters' names in the sources of a description by those of the file's tensors."""
    stored = {param: name for name, param in names.params.items()}
    sources = {
        name: tuple(Source(stored.get(source.tensor, source.tensor)) for source in tensors)
        for name, tensors in description.sources.items()
    }
    return replace(description, sources=sources)
