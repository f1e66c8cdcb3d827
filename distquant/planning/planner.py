"""Decides everything, once: resolves the configuration, checks it all, partitions the model, and freezes a `LoadPlan`.

Planning has three stages. Each is frozen, and made from the one before by a function that does no I/O:

    describe -> Described      checkpoint, method and model as plain data; which modules are converted
    partition -> Partitioned   and how each tensor is divided over the ranks
    plan_memory -> Planned     and the bytes of every rank

Reads configs and headers only. Touches no weight, no device and no process group. Every problem that can be known from
them is raised together, before a weight byte moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from distquant.config.pattern_places import places_of
from distquant.config.resolve import Merged, resolve
from distquant.environment import Environment
from distquant.errors import InputError, Problems
from distquant.garbage_collection import without_collector
from distquant.model import STAR, Decoder, Linear, describe_decoder
from distquant.patterns import limited_matching
from distquant.planning.changes import with_changes
from distquant.planning.described import Described, describe, fields_of
from distquant.planning.estimates import estimate
from distquant.planning.expert_parallel import expert_rules, plan_experts
from distquant.planning.generation_memory import Estimates
from distquant.planning.load_plan import LoadPlan, ModuleShard, TensorPlan
from distquant.planning.plan_builder import Partitioned
from distquant.planning.planned import Planned, freeze, plan_memory
from distquant.planning.prepared import Prepared, build_for_load, open_for_load
from distquant.planning.read_strategy import read_strategy
from distquant.planning.request import Given, Request, check_model, collected, read_request
from distquant.planning.tensor_parallel import (
    COLWISE,
    COLWISE_GATHER,
    GRAD_REDUCE,
    ROWWISE,
    ROWWISE_SPLIT,
    VOCAB_EMBEDDING,
    ParallelPlan,
    rewrite_tp_plan,
)
from distquant.planning.validation import check_described, check_device_memory, check_rank_memory
from distquant.process_state import changing_process_state
from distquant.quantization import config_classes
from distquant.sharding.layout import Layout, plain

SHARD_DIM = {COLWISE: 0, COLWISE_GATHER: 0, VOCAB_EMBEDDING: 0, ROWWISE: 1, ROWWISE_SPLIT: 1}
"""The weight's dim that each style partitions."""


def make_plan(request: Request, environment: Environment) -> LoadPlan:
    """Plans a load; raises `InputError` with every problem.

    Where the devices have too little memory to generate, the plan has the changes of the request that make it fit.
    """
    return _plan(request, environment, advise=True)[0]


def plan_and_open(request: Request, environment: Environment) -> tuple[LoadPlan, Prepared]:
    """Plans a load as `make_plan` does; also returns what was opened for it, for a load that follows at once."""
    return _plan(request, environment, advise=False)


@without_collector()
@changing_process_state()
def _plan(request: Request, environment: Environment, advise: bool) -> tuple[LoadPlan, Prepared]:
    """Plans a load.

    Args:
        request: as the user gave it.
        environment: the devices, as far as they are known.
        advise: True to look for changes also where it loads, but would have too little memory to generate.
    """
    problems = Problems()
    given = read_request(request, problems)
    with _with_earlier(problems):
        check_model(request.model)
        checkpoint = open_for_load(request)
        merged, skipped = resolve(checkpoint.config, given.config, config_classes(), request.on_unsupported)
        prepared = Prepared(checkpoint, build_for_load(checkpoint, given.dtype, request))
    with limited_matching(places_of(merged.config)):
        return _plan_opened(request, environment, advise, given, prepared, merged, skipped, problems), prepared


def _plan_opened(
    request: Request,
    environment: Environment,
    advise: bool,
    given: Given,
    prepared: Prepared,
    merged: Merged,
    skipped: dict[str, Any] | None,
    problems: Problems,
) -> LoadPlan:
    """Plans a load whose checkpoint and model are open; arguments are those of `_plan` and `describe`."""
    model, attention, trusted = prepared.model, request.attn_implementation, request.trust_remote_code
    described = describe(request, given, environment, prepared, merged, skipped, problems)
    has_device_map = request.device_map is not None
    if not check_described(described, environment, has_device_map, problems):
        problems.raise_if_any()  # sizes would follow from a form that is not supported
    partitioned = partition(described)
    dtype = str(model.dtype).removeprefix("torch.")
    with collected(problems):
        planned = plan_memory(partitioned)
        decoder = describe_decoder(model)
        estimates = _estimate(request, planned, dtype, decoder, environment)
        loads = all(device.loads is not False for device in estimates.memory())
        if not problems and (advise or not loads):
            replan = partial(_replan, request, prepared, decoder, environment)
            estimates = with_changes(planned, estimates, replan)
        if described.sizes_known and not has_device_map:
            check_rank_memory(planned, environment, problems, estimates)
    if described.sizes_known and described.device_map is not None:
        with collected(problems):
            check_device_memory(partitioned, described.device_map, request.max_memory, problems)
    problems.raise_if_any()  # also if `plan_memory` raised, so from here on there is a planned load
    return freeze(planned, dtype, environment, trusted, attention, estimates)


def _estimate(
    request: Request, planned: Planned, dtype: str, decoder: Decoder | None, environment: Environment
) -> Estimates:
    return estimate(planned, dtype, decoder, environment, request.max_memory, request.context, request.batch)


def _replan(
    request: Request,
    prepared: Prepared,
    decoder: Decoder | None,
    environment: Environment,
    change: Mapping[str, Any],
) -> Estimates | None:
    """Returns the estimates with some options changed; None where such a load cannot work."""
    changed, problems = replace(request, **change), Problems()
    # Which ranks share a node, and how many there are, was known for the request's own mesh.
    environment = replace(environment, nodes=(), device_count=None)
    checkpoint, dtype = prepared.checkpoint, str(prepared.model.dtype).removeprefix("torch.")
    with collected(problems):
        given = read_request(changed, problems)
        merged, skipped = resolve(checkpoint.config, given.config, config_classes(), request.on_unsupported)
        described = describe(changed, given, environment, prepared, merged, skipped, problems)
        check_described(described, environment, changed.device_map is not None, problems)
        if not problems:
            return _estimate(changed, plan_memory(partition(described)), dtype, decoder, environment)
    return None


@contextmanager
def _with_earlier(problems: Problems) -> Iterator[None]:
    """Adds earlier problems to the `InputError` of a step that planning cannot go on without."""
    try:
        yield
    except InputError as error:
        problems.extend(error.problems)
        raise InputError(problems) from error


# -- partitioning ------------------------------------------------------------------------------------------------------


def partition(described: Described) -> Partitioned:
    """Divides a described load over the ranks of its mesh."""
    parallel = _parallel_plan(described)
    return Partitioned(**fields_of(described), parallel=parallel, tensors=tuple(_tensor_plans(described, parallel)))


def _parallel_plan(described: Described) -> ParallelPlan:
    """Returns the model's own parallel plans, rewritten for the layouts of its weights."""
    description, mesh, scheme = described.description, described.mesh, described.scheme
    tp_plan, ep_plan = (
        scheme.update_tp_plan(dict(description.tp_plan)),
        scheme.update_ep_plan(dict(description.ep_plan)),
    )
    layout_of, parallel = _layouts(described), ParallelPlan()
    if mesh.tp > 1 and description.tp_plan:
        # Rules for experts of known form are read by `plan_experts`, which partitions experts and reports the rules.
        for_experts = {rule for rules in expert_rules(description, tp_plan).values() for rule in rules}
        dense = {rule: style for rule, style in tp_plan.items() if rule not in for_experts}
        parallel = rewrite_tp_plan(description, dense, mesh.tp, layout_of)
    # With fewer experts than ranks of ep there is nothing to plan, and `check_described` has reported it.
    if described.stacked and all(mesh.ep <= description.experts[name].count for name in described.stacked):
        plan_experts(description, described.stacked, mesh, (tp_plan, ep_plan), layout_of, parallel)
    return parallel


def _layouts(described: Described) -> Callable[[str], Layout]:
    """Returns the function that gives the layout of a linear module's weight."""
    description, converted = described.description, set(described.converted)

    def layout_of(name: str) -> Layout:
        linear, weight = description.linears[name], description.params.get(f"{name}.weight")
        dtype = weight.dtype if weight else "float32"
        if name not in converted:
            return plain(dtype)
        # Experts of a stack have equal layouts; a method that tells modules apart by name is asked for the first.
        one = f"{name}.weight".replace(STAR, "0")
        return described.scheme.layout(one, (linear.out_features, linear.in_features), dtype)

    return layout_of


def _tensor_plans(described: Described, parallel: ParallelPlan) -> Iterator[TensorPlan]:
    """Yields an entry a tensor, in the order of files and offsets: ranks read files from front to back."""
    description, converted = described.description, set(described.converted)
    order = {name: i for i, name in enumerate(described.checkpoint.tensors)}

    def position(name: str) -> int:
        return min((order[source.tensor] for source in description.sources[name]), default=0)

    for name in sorted(description.sources, key=position):
        module, _, leaf = name.rpartition(".")
        scheme = described.scheme.name if module in converted and leaf == "weight" else "none"
        linear = description.linears.get(module)
        if linear is None or not linear.experts:
            yield _tensor_plan(described, parallel, linear, name, scheme)
        elif parallel.experts:  # else they could not be distributed over ep, which has been reported
            yield _stack_plan(described, parallel, linear, name, scheme)


def _tensor_plan(
    described: Described, parallel: ParallelPlan, linear: Linear | None, name: str, scheme: str
) -> TensorPlan:
    """Returns the entry of a parameter or buffer outside stacks of experts."""
    description = described.description
    param, sources = description.params[name], description.sources[name]
    module, _, leaf = name.rpartition(".")
    shard = parallel.modules.get(module) or _tied_shard(description.tied, parallel, name)
    dim = _shard_dim(shard, leaf)
    key = shard.partition if shard is not None and dim is not None else None
    # Conv1D stores `[in, out]`. A quantized weight is always `[out, in]`: as a method stores it, or transposed on load.
    transposed = scheme != "none" and linear is not None and linear.transposed
    return TensorPlan(
        name=name,
        shape=param.shape[::-1] if transposed else param.shape,
        dtype=param.dtype,
        scheme=scheme,
        sources=sources,
        shard_dim=dim,
        partition=key,
        transposed=transposed and not described.prequantized,
        reading=read_strategy(dim, parallel.partitions[key] if key else None, described.mesh, described.nodes),
    )


def _stack_plan(described: Described, parallel: ParallelPlan, linear: Linear, name: str, scheme: str) -> TensorPlan:
    """Returns the entry of one projection of all experts of a module, or of its biases."""
    param, sources = described.description.params[name], described.description.sources[name]
    is_bias = name.endswith(".bias")
    dim, key = parallel.stacks.get(linear.name, (None, None))
    if is_bias and dim == 1:  # a bias has outputs only; partitioned inputs leave it replicated
        dim, key = None, None
    stored_quantized = described.prequantized and scheme != "none"
    partition = parallel.partitions[key] if key else None
    return TensorPlan(
        name=name,
        shape=param.shape,
        dtype=param.dtype,
        scheme=scheme,
        sources=sources,
        shard_dim=None if dim is None else dim + 1,  # the first dim of a stack counts experts
        partition=key,
        transposed=linear.transposed and not is_bias and not stored_quantized,
        reading=read_strategy(dim, partition, described.mesh, described.nodes, expert=True),
        experts=parallel.experts[name.partition(f".{STAR}.")[0]].ep_partition,
    )


def _tied_shard(tied: dict[str, str], parallel: ParallelPlan, name: str) -> ModuleShard | None:
    """Returns the shard of a module whose parameter is tied to this one (whose own module may have no rule)."""
    sharers = (target.rpartition(".")[0] for target, source in tied.items() if source == name)
    return next((parallel.modules[module] for module in sharers if module in parallel.modules), None)


def _shard_dim(shard: ModuleShard | None, leaf: str) -> int | None:
    """Returns the dim of a module's parameter that its style partitions; None = replicated."""
    if shard is None or shard.style == GRAD_REDUCE:
        return None
    dim = SHARD_DIM[shard.style]
    if leaf == "bias":
        return 0 if dim == 0 else None
    return dim
