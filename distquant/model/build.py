"""Builds the model on `meta` with transformers, and describes it as a `ModelDescription`."""

from __future__ import annotations

import inspect
import math
import os
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distquant.errors import RAISED_BY_LIBRARIES, InputError, Problems, one_line
from distquant.model.description import Attention, Linear, ModelDescription, Param, Source
from distquant.model.experts import experts_of
from distquant.model.generation_fields import generation_problems
from distquant.model.gguf import source_of
from distquant.model.module_limit import module_limit
from distquant.model.sidecars import model_file_problems
from distquant.model.unbuilt import why_not_built
from distquant.model.weight_mapping import ignorable, map_names
from distquant.process_state import changing_process_state

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel


def _strict_error() -> type[Exception]:
    """Returns huggingface_hub's error for config fields of the wrong type."""
    from huggingface_hub.errors import StrictDataclassError

    return StrictDataclassError


@changing_process_state()
def build(
    path: Path,
    dtype: str | None,
    *,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    stored_dtype: str | None = None,
    has_head: bool = False,
    tensors: int = 0,
) -> PreTrainedModel:
    """Builds the model of a checkpoint folder or GGUF file on `meta`.

    Args:
        path: the folder or file.
        dtype: of the weights; None takes the config's, else that of the checkpoint's tensors, else float32.
        trust_remote_code: True to run the checkpoint's own code.
        attn_implementation: that of transformers; None leaves the choice to it.
        stored_dtype: dtype of the checkpoint's tensors.
        has_head: True if the files of a GGUF model have an output head. transformers looks at the first one only.
        tensors: number of the checkpoint's.

    Raises:
        InputError: transformers does not know the model or this attention, or it needs code from the checkpoint.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from distquant.model.uninitialized import Uninitialized

    if problems := list(model_file_problems(path)):
        raise InputError(problems)
    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    config: Any = None
    try:
        folder, gguf = source_of(path)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **gguf)
        has_quantization = getattr(config, "quantization_config", None) is not None
        if has_quantization:
            del config.quantization_config
        if has_head:
            config.tie_word_embeddings = False
        wanted = dtype or _config_dtype(config) or stored_dtype or "float32"
        with torch.device("meta"), Uninitialized(), module_limit(tensors), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, wanted), trust_remote_code=trust_remote_code, **attention
            )
        if model.can_generate() and os.path.isfile(path / "generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(path)
            problems = list(generation_problems(model.generation_config, _vocabulary(config)))
    except (*RAISED_BY_LIBRARIES, _strict_error()) as error:
        if attention and re.search("attn_implementation|attention", str(error), re.IGNORECASE):
            fault = f"transformers cannot use {attn_implementation!r} ({one_line(error)})"
            raise InputError.one("attn_implementation", fault, "Give 'sdpa' or 'eager', or leave it out") from error
        fault, fix = why_not_built(error, config, trust_remote_code)
        raise InputError.one(str(path), fault, fix) from error
    if problems:
        raise InputError(problems)
    return model.eval()


def _vocabulary(config: Any) -> int | None:
    size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    return size if type(size) is int else None


def _config_dtype(config: Any) -> str | None:
    """Returns the dtype that a config names, for the model or (of a multimodal one) for its text model."""
    parts = (config, config.get_text_config(decoder=True))
    return next((name for part in parts if (name := _name(getattr(part, "dtype", None)))), None)


def describe_model(
    model: PreTrainedModel,
    tensors: Mapping[str, tuple[int, ...]],
    suffixes: Mapping[str, str],
    problems: Problems,
) -> ModelDescription:
    """Describes a model on `meta` and places the checkpoint's tensors in it.

    Args:
        model: as `build` returns it.
        tensors: shape of each checkpoint tensor.
        suffixes: checkpoint suffix -> component, as the quantization method stores them.
        problems: collects the tensors that cannot be placed.
    """
    params, forced = _params(model)
    shapes = {name: param.shape for name, param in params.items()}
    sources, parts, unexpected = map_names(model, shapes, tensors, suffixes, problems)
    known, unknown = experts_of(model)
    _, left = ignorable(unexpected, model._keys_to_ignore_on_load_unexpected)
    _, left = ignorable(left, [r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"])
    tied = _ties(model, sources)
    params = {name: param for name, param in params.items() if name not in tied}
    sources = {name: each for name, each in sources.items() if name in params}
    _, missing = ignorable([n for n in params if n not in sources], model._keys_to_ignore_on_load_missing)
    unconverted = tuple(name for name, each in sources.items() if not each)
    sources = {name: each for name, each in sources.items() if each}
    return ModelDescription(
        model_type=model.config.model_type,
        architecture=type(model).__name__,
        params=params,
        tied=tied,
        sources=sources,
        unexpected=tuple(left),
        missing=tuple(missing),
        unconverted=unconverted,
        forced={name: reason for name, reason in forced.items() if name in params},
        linears=_linears(model),
        attentions=_attentions(model),
        embeddings=tuple(_modules_of(model, "Embedding")),
        input_embedding=_path_of(model, model.get_input_embeddings()),
        output_embedding=_path_of(model, model.get_output_embeddings()),
        experts=known,
        unknown_experts=unknown,
        parts=parts,
        tp_plan=dict(getattr(model, "tp_plan", None) or {}),
        ep_plan=dict(getattr(model, "_ep_plan", None) or {}),  # 5.17 has no property for it
        default_skip=tuple(sorted(_default_skip(model))),
        no_split=tuple(sorted(getattr(model, "_no_split_modules", None) or ())),
        modules=tuple(name for name, _ in model.named_modules() if name),
    )


def _params(model: PreTrainedModel) -> tuple[dict[str, Param], dict[str, str]]:
    """Returns all parameters and persistent buffers with the dtype in which they are loaded, and why some have another.

    transformers forces a dtype on what loses too much in 16 bits, by a list of patterns or where a module makes it.
    Both depend on its version.
    """
    plan = model._get_dtype_plan(model.dtype)
    tensors = model.state_dict(keep_vars=True)
    buffers = {name for name, _ in model.named_buffers()}
    params, forced = {}, {}
    for name, tensor in tensors.items():
        pattern = next((pattern for pattern in plan if re.search(rf"(^|\.){pattern}(\.|$)", name)), None)
        dtype = _name(tensor.dtype if pattern is None else plan[pattern]) or "float32"
        params[name] = Param(name, tuple(tensor.shape), dtype, name in buffers)
        if tensor.is_floating_point() and dtype != _name(model.dtype):
            module = model.get_submodule(name.rpartition(".")[0])
            decides = type(module).__name__ if pattern is None else _attribute(model, pattern)
            forced[name] = f"as transformers {_release()} does ({decides})"
    return params, forced


def _release() -> str:
    """Returns the release of transformers without the number of its patch."""
    import transformers

    return ".".join(transformers.__version__.split(".")[:2])


def _attribute(model: PreTrainedModel, pattern: str) -> str:
    """Returns the attribute of transformers' class that asks for a dtype."""
    strict = "_keep_in_fp32_modules_strict"
    return strict if pattern in (getattr(model, strict, None) or ()) else "_keep_in_fp32_modules"


def _ties(model: PreTrainedModel, sources: Mapping[str, tuple[Source, ...]]) -> dict[str, str]:
    """Returns tied parameter -> the one that is loaded. If the checkpoint holds both, both are: they may differ."""
    tied = {}
    for target, source in model.all_tied_weights_keys.items():
        if target in sources and source in sources:
            continue
        if target in sources:
            target, source = source, target
        tied[target] = source
    return tied


def _linears(model: PreTrainedModel) -> dict[str, Linear]:
    """Returns the modules that are exactly `nn.Linear` or `Conv1D`; subclasses may compute something else."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    linears = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            linears[name] = Linear(name, module.out_features, module.in_features, module.bias is not None)
        elif type(module) is Conv1D:
            rows, columns = module.weight.shape
            linears[name] = Linear(name, columns, rows, True, transposed=True)
    return linears


def _attentions(model: PreTrainedModel) -> dict[str, Attention]:
    """Returns the attention modules with known head counts; the planner replicates others."""
    attentions = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        head_dim = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
        heads = getattr(config, "num_attention_heads", None)
        if name.endswith(("attn", "attention")) and isinstance(head_dim, int) and isinstance(heads, int):
            kv = getattr(module, "num_key_value_heads", None) or getattr(config, "num_key_value_heads", None) or heads
            groups = getattr(module, "num_key_value_groups", None)
            kv = heads // groups if isinstance(groups, int) and groups > 0 else kv
            blocks = getattr(module, "mp_num", None)  # CodeGen packs q, v and k of a few heads into each of its blocks
            together = heads // math.gcd(heads, blocks) if isinstance(blocks, int) and blocks > 0 else 1
            attentions[name] = Attention(name, heads, kv, head_dim, together)
    return attentions


def _default_skip(model: PreTrainedModel) -> set[str]:
    """Returns what transformers leaves unquantized by default: tied weights, the last module, the output head."""
    from transformers.quantizers.base import get_keys_to_not_convert

    return set(get_keys_to_not_convert(model))


def _modules_of(model: PreTrainedModel, kind: str) -> list[str]:
    from torch import nn

    return [name for name, module in model.named_modules() if isinstance(module, getattr(nn, kind))]


def _path_of(model: PreTrainedModel, wanted: Any) -> str | None:
    return next((n for n, m in model.named_modules() if wanted is not None and m is wanted), None)


_READS_HEADS: dict[str, bool] = {}
"""Results by class: reading a source file again for each of hundreds of layers is slow."""


def reads_heads_from_config(module: Any) -> bool:
    """Returns True if a module's forward slices by `self.config.num_...`, so that a shard needs its own config."""
    kind = type(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name not in _READS_HEADS:
        _READS_HEADS[name] = "self.config.num_" in inspect.getsource(kind.forward)
    return _READS_HEADS[name]


def _name(dtype: Any) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")
