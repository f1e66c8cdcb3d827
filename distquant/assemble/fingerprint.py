"""The fingerprint of an assembled model: every rank tallies what it owns, and the sums are added up."""

from __future__ import annotations

from typing import Any

from distquant.assemble.local import shard_of
from distquant.errors import InputError
from distquant.tally import LANES, Tally, combine


def fingerprint(model: Any) -> str:
    """32 hex digits that are equal exactly if all codes and scales are; see `distquant.tally`.

    On a sharded model all ranks must call it, and all get the same answer. Replicas (dp) and repeated rows count once.

    Args:
        model: as `distquant.load` returned it, also after `generate`, training steps of adapters, or PEFT's wrapping.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    loaded = model.distquant
    plan, scheme, comm = loaded.plan, loaded.scheme, loaded.comm
    at = plan.mesh.coordinates(comm.rank)
    if scheme.delegated:
        what = f"transformers loaded the model with its own quantizer for {scheme.config.quant_method!r}"
        raise InputError.one("fingerprint", what, "Only weights that distquant quantizes or cuts have a fingerprint")
    lanes = [0] * LANES
    if at["dp"] == at["ep"] == 0:
        for tensor in plan.tensors:
            tally = Tally(tensor.name)
            module = _original(model, tensor.name.rpartition(".")[0])
            if at["tp"] == 0:
                tally.constant(f"{tensor.scheme} {list(tensor.shape)} {tensor.dtype}")
            if tensor.scheme != "none" and not plan.dequantize:
                scheme.tally(module, shard_of(tensor, plan, at["tp"]), tally)
            else:
                _tally_plain(module, tensor, plan, at["tp"], tally)
            lanes = [a + b for a, b in zip(lanes, tally.lanes, strict=True)]
    return combine(comm.collect(lanes))


def _original(model: Any, path: str) -> Any:
    """The loaded module at a path, below an adapter that may have taken its place."""
    module = model.get_submodule(path)
    return getattr(module, "base_layer", module)


def _tally_plain(module: Any, tensor: Any, plan: Any, rank: int, tally: Tally) -> None:
    leaf = tensor.name.rpartition(".")[2]
    value = module._parameters.get(leaf)
    value = module._buffers[leaf] if value is None else value
    if value.is_meta:  # on the disk, under accelerate's hook
        value = module._hf_hook.weights_map[leaf]
    if tensor.cut is not None:
        tally.tensor(value, plan.cuts[tensor.cut].owned(rank), tensor.dim)
    elif rank == 0:
        whole = value.shape[0] if value.dim() else 1
        tally.tensor(value, (((0, whole), 0),), 0)
