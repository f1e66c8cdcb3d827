"""The fingerprint of an assembled model: every rank tallies the elements that it owns, and the sums are added up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from distquant.errors import InputError
from distquant.loading.local_modules import shard_of
from distquant.loading.offload import present
from distquant.model import STAR
from distquant.model.experts import form_of
from distquant.parallel.experts import LocalExperts
from distquant.planning.expert_parallel import expert_name, first_expert
from distquant.planning.load_plan import LoadPlan, TensorPlan
from distquant.quantization import QuantizedScheme, Scheme
from distquant.sharding.tally import LANES, Tally, combine


def fingerprint(model: Any, *, quantized_only: bool = False) -> str:
    """Returns 32 hex digits that are equal exactly if all codes and scales are; see `distquant.sharding.tally`.

    Unquantized tensors count by their bits and dtype, and transformers' version decides the dtype of some: routers are
    float32 in more families since 5.24. The digits of quantized weights alone do not depend on that.

    On a sharded model all ranks must call it, and all get the same digits. Replicas (dp) and repeated rows count once.

    Args:
        model: as `distquant.load` returned it, also after `generate`, training steps of adapters, or PEFT's wrapping.
        quantized_only: True to count quantized weights alone.

    Raises:
        InputError: transformers quantized the model, or only quantized weights are to count and there are none.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    loaded = getattr(model, "distquant", None)
    if loaded is None:
        fault = f"{type(model).__name__} was not loaded by distquant, so the layout of its weights is not known"
        fix = "Give the model that distquant.load returns; of a checkpoint: distquant.fingerprint(distquant.load(path))"
        raise InputError.one("model", fault, fix)
    plan, scheme, comm = loaded.plan, loaded.scheme, loaded.comm
    position = plan.mesh.coordinates(comm.rank)
    if scheme.delegated:
        problem = f"transformers loaded the model with its own quantizer for {scheme.config.quant_method!r}"
        fix = "Only weights that distquant quantizes or shards have a fingerprint"
        raise InputError.one("fingerprint", problem, fix)
    tensors = plan.tensors
    if quantized_only:
        tensors = tuple(tensor for tensor in tensors if tensor.scheme != "none" and not plan.dequantize)
        if not tensors:
            raise InputError.one("quantized_only", "the model has no quantized weights", "Leave quantized_only out")
    facts = _facts_without_dtype if quantized_only else _facts
    lanes = [0] * LANES
    if position["dp"] == 0:
        for tensor in tensors:
            for tally in _tallies(model, tensor, plan, scheme, position, facts):
                lanes = [a + b for a, b in zip(lanes, tally.lanes, strict=True)]
    return combine(comm.collect(lanes))


Facts = Callable[[TensorPlan], str]


def _facts(tensor: TensorPlan) -> str:
    return f"{tensor.scheme} {list(tensor.shape)} {tensor.dtype}"


def _facts_without_dtype(tensor: TensorPlan) -> str:
    """Describes a quantized weight. A family may keep it in float32, as transformers' version has it."""
    return f"{tensor.scheme} {list(tensor.shape)}"


def _tallies(
    model: Any, tensor: TensorPlan, plan: LoadPlan, scheme: Scheme, position: dict[str, int], facts: Facts
) -> Iterator[Tally]:
    """Yields this rank's tallies of one entry of the plan. Each expert counts by itself, however it is stored."""
    owner = tensor.name.rpartition(".")[0]
    if tensor.experts is not None:
        owner, _, path = tensor.name.partition(f".{STAR}.")
        module = model.get_submodule(owner)
        with present(module):
            if not isinstance(module, LocalExperts):  # the model's own again, after `dequantize`
                module = _experts_around(owner, module)
            yield from _experts(module, tensor, path, plan, position, facts)
        return
    if position["ep"] > 0:
        return
    module = _original(model, owner)
    with present(module):
        yield from _of_module(module, tensor, plan, scheme, position, facts)


def _of_module(
    module: Any, tensor: TensorPlan, plan: LoadPlan, scheme: Scheme, position: dict[str, int], facts: Facts
) -> Iterator[Tally]:
    """Yields this rank's tallies of an entry that is one parameter of a module, or of the experts in it."""
    owner, _, leaf = tensor.name.rpartition(".")
    experts = _experts_around(owner, module) if leaf not in ("weight", "bias") and len(tensor.shape) > 1 else None
    if experts is not None:
        suffix = leaf.endswith("_bias")
        for projection in experts.form.projections:
            if projection.parameter + "_bias" * suffix == leaf:
                path = f"{projection.name}.{'bias' if suffix else 'weight'}"
                shape = (experts.form.count, *experts.plain_value(path, 0).shape)
                stack = TensorPlan(f"{owner}.{STAR}.{path}", shape, tensor.dtype, "none", (), experts="")
                yield from _experts(experts, stack, path, plan, position, facts)
        return
    tally = Tally(tensor.name)
    if position["tp"] == 0:
        tally.constant(facts(tensor))
    if tensor.scheme != "none" and not plan.dequantize:
        assert isinstance(scheme, QuantizedScheme), "no other scheme converts modules"
        scheme.tally(module, shard_of(tensor, plan, position["tp"]), tally)
    else:
        _tally_plain(module, tensor, plan, position["tp"], tally)
    yield tally


def _experts_around(owner: str, module: Any) -> LocalExperts | None:
    """Returns the experts of a model's own module, if it has a known form."""
    shapes = {leaf: tuple(value.shape) for leaf, value in module.named_parameters(recurse=False)}
    form = form_of(owner, module, shapes)
    return None if form is None else LocalExperts.around(module, form)


def _experts(
    module: LocalExperts, stack: TensorPlan, path: str, plan: LoadPlan, position: dict[str, int], facts: Facts
) -> Iterator[Tally]:
    """Yields the tallies of this rank's experts of one stack."""
    one = first_expert(stack)
    for number in range(module.first, module.last):
        tensor = replace(one, name=expert_name(stack.name, number))
        tally = Tally(tensor.name)
        if position["tp"] == 0:
            tally.constant(facts(tensor))
        if path in module.plain:
            owned = plan.partitions[tensor.partition].owned(position["tp"]) if tensor.partition else None
            _tally_value(
                module.plain_value(path, number - module.first), owned, tensor.shard_dim, position["tp"], tally
            )
        else:
            stacked, shard = module.stack(path.partition(".")[0]), shard_of(tensor, plan, position["tp"])
            with present(stacked):
                for stream, values, span in stacked.scheme.fingerprint_streams(
                    shard, stacked.components(number - module.first)
                ):
                    tally.shard(stream, values, shard.shape, shard.shard_dim, shard.owned, span=span)
        yield tally


def _original(model: Any, path: str) -> Any:
    """Returns the loaded module at a path, also below an adapter that has replaced it."""
    module = model.get_submodule(path)
    return getattr(module, "base_layer", module)


def _tally_plain(module: Any, tensor: Any, plan: Any, rank: int, tally: Tally) -> None:
    leaf = tensor.name.rpartition(".")[2]
    value = module._parameters.get(leaf)
    value = module._buffers[leaf] if value is None else value
    _tally_value(
        value,
        plan.partitions[tensor.partition].owned(rank) if tensor.partition else None,
        tensor.shard_dim,
        rank,
        tally,
    )


def _tally_value(value: Tensor, owned: Any, dim: int | None, rank: int, tally: Tally) -> None:
    """Counts a plain tensor: the segments that this rank of tp owns, or all of it on the first rank."""
    if owned is not None:
        assert dim is not None
        tally.tensor(value, owned, dim)
    elif rank == 0:
        length = value.shape[0] if value.dim() else 1
        tally.tensor(value, (((0, length), 0),), 0)
