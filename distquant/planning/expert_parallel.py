"""Deals experts out over ep, and cuts each over tp, from the model's own plans rewritten.

Plans of transformers differ in style. Up to 5.17 the router maps ids (`ep_router`) and the experts' output is summed
(`moe_tp_experts`); 5.23 sends tokens (`ep_dispatch_experts`). Their parameters are `grouped_gemm` in both (dealt out by
whole experts), and `packed_colwise` and `rowwise` under tp (Llama-4, transposed: `packed_rowwise` and `colwise`). What
they ask for is the same in all, and it is read here and nowhere else: whole experts for each rank of ep, and inside an
expert one cut of the intermediate features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from distquant.model.description import STAR, Experts, ModelDescription, Projection, wildcard
from distquant.model.experts import sources_by_expert, stack_name
from distquant.planning.load_plan import ExpertsShard, Rule, TensorPlan
from distquant.planning.tensor_parallel import ParallelPlan, lengths
from distquant.sharding.layout import Layout
from distquant.sharding.mesh import Mesh
from distquant.sharding.partition import Partition, even_partition, join_partitions

ALL_REDUCE, ALL_TO_ALL = "all_reduce", "all_to_all"

DISPATCH = {
    ALL_REDUCE: "all ranks of ep hold the same tokens; each runs its own experts on them, and the results are summed",
    ALL_TO_ALL: "every rank of ep holds tokens of its own; they are sent to the ranks of their experts and back",
}
"""How tokens reach experts on other ranks of ep."""


def expert_rules(description: ModelDescription, plan: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The rules of a parallel plan that are for experts of known form: pattern of the module -> rule -> style.

    A rule is for a module's experts if it names the module, one of its parameters, or its router (which has no cut).
    """
    found: dict[str, dict[str, str]] = {wildcard(name): {} for name in description.experts}
    for pattern, style in plan.items():
        owner = next((known for known in found if pattern == known or pattern.startswith(known + ".")), None)
        if owner is None and style == "ep_router":
            block = pattern.rpartition(".")[0]
            owner = next((known for known in found if known.startswith(block + ".")), None)
        if owner is not None:
            found[owner][pattern] = style
    return found


def plan_experts(
    description: ModelDescription,
    modules: Iterable[str],
    mesh: Mesh,
    plans: tuple[Mapping[str, str], Mapping[str, str]],
    layout_of: Callable[[str], Layout],
    parallel: ParallelPlan,
) -> None:
    """Adds the cuts and the shards of these modules of experts, and the story of their rules, to a parallel plan.

    Args:
        skeleton: the model, these modules split into stacks.
        modules: keys of `description.experts`.
        mesh: its ep is at most the number of experts.
        plans: the model's tensor- and expert-parallel plans, after the scheme's hooks.
        layout_of: how each linear weight is stored.
        parallel: gets them.
    """
    solved: dict[object, tuple[Partition | None, str]] = {}
    told: dict[tuple[str, str], int] = {}
    for name in modules:
        experts = description.experts[name]
        layouts = {p: layout_of(stack_name(name, p.name)) for p in experts.projections}
        key = (experts.count, experts.intermediate, experts.interleaved, *layouts.items())
        if key not in solved:
            solved[key] = _partition_inside(experts, layouts, mesh.tp) if mesh.tp > 1 else (None, "")
        partition, reason = solved[key]
        dealt = even_partition(experts.count, 1, mesh.ep)
        assert dealt is not None, "more ranks of ep than experts are refused before"
        inside = parallel.key_of(partition) if partition is not None else None
        parallel.experts[name] = ExpertsShard(parallel.key_of(dealt), inside)
        for projection in experts.projections:
            whole = partition_of(experts, projection, partition)
            if whole is not None:
                parallel.stacks[stack_name(name, projection.name)] = (projection.shard_dim, parallel.key_of(whole))
        became = f"experts {lengths(dealt)}" if mesh.ep > 1 else "every expert"
        if mesh.tp > 1:
            became += f", features {lengths(partition)}" if partition else ", whole on every rank of tp"
        told[wildcard(name), f"{became}\0{reason}"] = told.get((wildcard(name), f"{became}\0{reason}"), 0) + 1
    _tell(description, plans, mesh, told, parallel)


def _tell(
    description: ModelDescription,
    plans: tuple[Mapping[str, str], Mapping[str, str]],
    mesh: Mesh,
    told: Mapping[tuple[str, str], int],
    parallel: ParallelPlan,
) -> None:
    tp, ep = (expert_rules(description, plan) for plan in plans)
    for (pattern, story), count in told.items():
        became, reason = story.split("\0")
        asked: dict[str, list[str]] = {}
        for wanted, size in ((ep, mesh.ep), (tp, mesh.tp)):
            for rule, style in wanted[pattern].items() if size > 1 else ():
                asked.setdefault(rule.rpartition(".")[2], []).append(style)
        styles = ", ".join(f"{leaf}: {' + '.join(dict.fromkeys(found))}" for leaf, found in asked.items()) or "no rule"
        whole = "whole experts" if mesh.ep > 1 else ""
        why = "; ".join(part for part in (whole, reason) if part) or "as asked"
        parallel.rules.append(Rule(pattern, styles, became, why, count))


def _partition_inside(
    experts: Experts, layouts: Mapping[Projection, Layout], ranks: int
) -> tuple[Partition | None, str]:
    """One cut of the intermediate features that is legal for every projection, and its unit; or why there is none."""
    alignments = {p: layouts[p].alignments((p.out_features, p.in_features), p.shard_dim) for p in experts.projections}
    barred = [p.name for p, steps in alignments.items() if not steps]
    if barred:
        return None, f"{experts.intermediate} features, which the quantization blocks of {barred[0]} do not divide"
    alignment, enough = 1, False
    for level in range(max(map(len, alignments.values()))):
        steps = {p: each[min(level, len(each) - 1)] for p, each in alignments.items()}
        alignment = math.lcm(
            *(step for p, step in steps.items() if p.shard_dim == 1 or p.out_features == experts.intermediate)
        )
        # Of gate and up in one projection, one feature is two rows.
        for multiple in (1, 2, 4, 8, 16, 32, 64, 128):
            partition = even_partition(experts.intermediate, alignment * multiple, ranks)
            if partition is None:
                break
            enough = True
            if all(
                whole is None or whole.legal(steps[p]) for p in steps for whole in [partition_of(experts, p, partition)]
            ):
                return partition, f"features in units of {alignment * multiple}"
    if enough:
        packed = next(p for p in alignments if p.shard_dim == 0)
        return None, f"no cut of gate and up, {experts.intermediate} features each, falls on the units of {packed.name}"
    return None, f"{experts.intermediate} features are fewer than {ranks} units of {alignment}"


def partition_of(experts: Experts, projection: Projection, partition: Partition | None) -> Partition | None:
    """The cut of a projection's own dim that follows from that of the intermediate features."""
    if partition is None or projection.shard_dim == 1 or projection.out_features == experts.intermediate:
        return partition
    return partition.scaled(2) if experts.interleaved else join_partitions([partition, partition])


def expert_name(stack: str, number: int) -> str:
    """The name of one expert's part of a stack."""
    return stack.replace(STAR, str(number))


def experts_of(tensor: TensorPlan, tensors: Mapping[str, tuple[int, ...]]) -> Iterator[TensorPlan]:
    """One entry for each expert of a stack, as if it were a module of its own; a tensor that is no stack is itself.

    Args:
        tensor: of a plan.
        tensors: shape of each checkpoint tensor.
    """
    if tensor.experts is None:
        yield tensor
        return
    count, *shape = tensor.shape
    for number, sources in enumerate(sources_by_expert(tensor.sources, count, tensors)):
        yield TensorPlan(
            expert_name(tensor.name, number),
            tuple(shape),
            tensor.dtype,
            tensor.scheme,
            sources,
            None if tensor.shard_dim is None else tensor.shard_dim - 1,
            tensor.partition,
            tensor.transposed,
            tensor.reading,
        )


def one_of(tensor: TensorPlan) -> TensorPlan:
    """One expert of a stack, without its sources; a tensor that is no stack is itself."""
    if tensor.experts is None:
        return tensor
    dim = None if tensor.shard_dim is None else tensor.shard_dim - 1
    return replace(
        tensor, name=expert_name(tensor.name, 0), shape=tensor.shape[1:], shard_dim=dim, experts=None, sources=()
    )
