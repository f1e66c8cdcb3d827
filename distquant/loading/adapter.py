"""A saved PEFT adapter on a loaded model: whether one is to be applied, and its weights on this rank.

transformers' `from_pretrained` applies an adapter that lies beside the model. Whoever loads such a folder here says
which of the two is meant, because either one alone would be a surprise.

Of LoRA on a partitioned module each rank takes its part: rows of `lora_B` where outputs are divided, columns of
`lora_A` where inputs are. `parallel.lora` then adds the communication.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distquant.checkpoint import ADAPTER_CONFIG, CheckpointError, read_header
from distquant.checkpoint.locate import locate
from distquant.errors import RAISED_BY_LIBRARIES, InputError, Problem, one_line
from distquant.files import CONFIG_BYTES, check_file, read_file
from distquant.planning.load_plan import LoadPlan
from distquant.planning.tensor_parallel import COLWISE, COLWISE_GATHER, ROWWISE, ROWWISE_SPLIT, VOCAB_EMBEDDING
from distquant.sharding.partition import Partition
from distquant.strict_json import parse_json

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Prefix of all names in an adapter's file."""
BASE = "base_layer"
"""Name of the module below an adapter."""


def find_adapter(plan: LoadPlan, asked: str | os.PathLike[str] | bool | None) -> Path | None:
    """Returns the folder of the adapter to apply; None for the model alone.

    Args:
        plan: of the model.
        asked: the option: a folder or id, False for none, None if it is not given.

    Raises:
        InputError: it is not given, and an adapter is in the model's folder; or the adapter cannot be applied.
    """
    if asked is None or asked is False:
        beside = os.path.join(plan.model, ADAPTER_CONFIG)
        if asked is None and os.path.lexists(beside):
            fault = f"{plan.model} holds a whole model, and an adapter beside it that transformers would apply"
            fix = f"Give adapter={plan.model!r} (--adapter {plan.model}) to apply it, or adapter=False (--no-adapter)"
            raise InputError.one("adapter", fault, fix)
        return None
    assert asked is not True, "RunOptions refuses it"
    folder, _ = locate(asked, None)
    if problems := list(_problems(folder, plan)):
        raise InputError(problems)
    return folder


def _problems(folder: Path, plan: LoadPlan) -> Iterator[Problem]:
    """Yields reasons why an adapter cannot be applied to the model of a plan."""
    try:
        config = _read_config(folder)
        check_file(folder / WEIGHTS)
        read_header(folder / WEIGHTS, WEIGHTS)
    except CheckpointError as error:
        for problem in error.problems:
            yield Problem("adapter", f"{folder}/{problem.where}: {problem.what}", "Copy or download the adapter again")
        return
    except (OSError, ValueError) as error:
        fault = f"{folder} holds no adapter that can be read ({one_line(error)})"
        yield Problem("adapter", fault, f"Give a folder with {ADAPTER_CONFIG} and {WEIGHTS}, as PEFT saves them")
        return
    try:
        import peft  # noqa: F401
    except ImportError:
        yield Problem("environment", "peft is not installed, an adapter needs it", "Run: pip install 'peft>=0.21'")
    kind = config.get("peft_type")
    if plan.mesh.tp * plan.mesh.ep > 1 and kind != "LORA":
        fault = f"{folder} is of type {kind!r}, and under {plan.mesh} only LoRA is supported"
        yield Problem("adapter", fault, "Load it in one process, without a mesh")
    if plan.device_map is not None and len(set(plan.device_map.values()) | {"disk"}) > 2:
        fault = "an adapter cannot be applied under a device map of several places"
        yield Problem("adapter", fault, "Give one device, or a mesh")
    elif plan.device_map is not None and "disk" in plan.device_map.values():
        yield Problem("adapter", "an adapter cannot be applied to modules on disk", "Give a device, or a mesh")


def _read_config(folder: Path) -> dict[str, Any]:
    """Returns PEFT's configuration of an adapter; raises OSError, or ValueError for anything but a JSON object."""
    config = parse_json(read_file(folder / ADAPTER_CONFIG, CONFIG_BYTES))
    if not isinstance(config, dict):
        raise ValueError(f"{ADAPTER_CONFIG} holds a JSON {type(config).__name__}, not an object")
    config.pop("runtime_config", None)  # PEFT ignores it, too
    return config


def apply_adapter(model: Any, plan: LoadPlan, tp: int, folder: Path) -> None:
    """Puts an adapter on a loaded model, frozen, as transformers' `load_adapter` does.

    Args:
        model: complete; changed.
        plan: of the model.
        tp: this rank's place on the axis.
        folder: as `find_adapter` returns it.

    Raises:
        InputError: PEFT cannot put it on this model, or its tensors are not those of these modules.
    """
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        # From bytes that were read here: the libraries would wait for a pipe, and die of a file that shrinks meanwhile.
        config = PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**_read_config(folder)))
        config.inference_mode = True
        size = read_header(folder / WEIGHTS, WEIGHTS).size
        tensors = load(read_file(folder / WEIGHTS, size))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a lora_dropout that is without effect
            inject_adapter_in_model(config, model, "default")
            known = dict(model.named_parameters())
            own = {name: _part(name, value, plan, tp) for name, value in tensors.items()}
            result = set_peft_model_state_dict(model, own, "default")
    except (SafetensorError, *RAISED_BY_LIBRARIES) as error:
        fix = "Check that the adapter was made for this model"
        raise InputError.one("adapter", f"{folder} cannot be applied ({one_line(error)})", fix) from error
    _check_complete(folder, known, result)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model._hf_peft_config_loaded = True  # so that transformers' own methods of adapters work
    model.eval()


def _check_complete(folder: Path, known: Mapping[str, Tensor], result: Any) -> None:
    """Raises `InputError` if tensors of the adapter have no place in the model, or its places no tensor."""
    unexpected = list(result.unexpected_keys)
    missing = [name for name in result.missing_keys if ".default." in name and name in known]
    problems = []
    for names, fault in ((unexpected, "has tensors that the model has no place for"), (missing, "has no tensors for")):
        if names:
            first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            problems.append(Problem("adapter", f"{folder} {fault}: {first}", "Give the adapter of this model"))
    if problems:
        raise InputError(problems)


def _part(name: str, value: Tensor, plan: LoadPlan, tp: int) -> Tensor:
    """Returns this rank's part of a tensor of an adapter, by its name in the file."""
    path, _, leaf = name.removeprefix(PREFIX).rpartition(".")
    module, _, side = path.rpartition(".")
    if path in plan.modules:  # an embedding, or an output head, that was saved with the adapter
        module, side = path, BASE
    shard = plan.modules.get(module)
    if shard is None or leaf != "weight":
        return value
    partition = plan.partitions[shard.partition]
    if shard.style in (COLWISE, COLWISE_GATHER, VOCAB_EMBEDDING) and side in ("lora_B", BASE):
        return _segments(value, 0, partition, tp)
    if shard.style in (ROWWISE, ROWWISE_SPLIT) and side in ("lora_A", BASE):
        return _segments(value, 1, partition, tp)
    return value


def _segments(value: Tensor, dim: int, partition: Partition, tp: int) -> Tensor:
    if value.shape[dim] != partition.size:
        raise ValueError(f"a tensor of shape {list(value.shape)} for a module of {partition.size} features")
    return torch.cat([value.narrow(dim, start, stop - start) for start, stop in partition.segments(tp)], dim)
