"""Distributes experts over ep, and shards each over tp, by the model's own parallel plans.

The plans of transformers differ in style. Up to 5.17 the router maps ids (`ep_router`) and the output of the experts is
summed (`moe_tp_experts`); 5.23 sends tokens (`ep_dispatch_experts`). The parameters are `grouped_gemm` in both: whole
experts. Under tp they are `packed_colwise` and `rowwise` (Llama-4, transposed: `packed_rowwise` and `colwise`). All of
them ask for the same two things, which are read here and nowhere else: whole experts for each rank of ep, and inside
an expert one partition of the intermediate features.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from distquant.model.description import STAR, ExpertsDescription, ModelDescription, Projection, wildcard
from distquant.model.experts import sources_by_expert, stack_name
from distquant.planning.load_plan import ExpertsShard, Rule, TensorPlan
from distquant.planning.parallel_plan import ParallelPlan, lengths
from distquant.sharding.layout import Layout
from distquant.sharding.mesh import Mesh
from distquant.sharding.partition import Partition, even_partition, join_partitions

MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Multiples of an alignment of features that are tried for a packed projection, whose rows have one of their own."""


def expert_rules(description: ModelDescription, plan: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Returns the rules of a parallel plan for experts of known form: pattern of the module -> rule -> style.

    A rule is for a module's experts if it names the module, one of its parameters, or its router (which is not
    sharded).
    """
    rules: dict[str, dict[str, str]] = {wildcard(name): {} for name in description.experts}
    for pattern, style in plan.items():
        owner = next((known for known in rules if pattern == known or pattern.startswith(known + ".")), None)
        if owner is None and style == "ep_router":
            # The router is a sibling of the experts: both are in one block.
            block = pattern.rpartition(".")[0]
            owner = next((known for known in rules if known.startswith(block + ".")), None)
        if owner is not None:
            rules[owner][pattern] = style
    return rules


class _Outcome(NamedTuple):
    """The outcome for the experts of a module, and its reason."""

    pattern: str
    became: str
    reason: str


def plan_experts(
    description: ModelDescription,
    modules: Iterable[str],
    mesh: Mesh,
    plans: tuple[Mapping[str, str], Mapping[str, str]],
    layout_of: Callable[[str], Layout],
    parallel: ParallelPlan,
) -> None:
    """Adds the partitions and the shards of these modules of experts, and records of their rules, to a parallel plan.

    Args:
        description: of the model, with these modules split into stacks.
        modules: keys of `description.experts`.
        mesh: its ep is at most the number of experts.
        plans: the model's tensor- and expert-parallel plans, after the scheme's hooks.
        layout_of: gives the layout of a linear weight.
        parallel: gets them.
    """
    solved: dict[object, tuple[Partition | None, str]] = {}
    outcomes: Counter[_Outcome] = Counter()
    for name in modules:
        experts = description.experts[name]
        layouts = {p: layout_of(stack_name(name, p.name)) for p in experts.projections}
        key = (experts.count, experts.intermediate, experts.interleaved, *layouts.items())
        if key not in solved:  # layers are alike
            solved[key] = _partition_inside(experts, layouts, mesh.tp) if mesh.tp > 1 else (None, "")
        partition, reason = solved[key]
        over_ep = even_partition(experts.count, 1, mesh.ep)
        assert over_ep is not None, "validation rejects more ranks of ep than experts"
        inside = parallel.key_of(partition) if partition is not None else None
        parallel.experts[name] = ExpertsShard(parallel.key_of(over_ep), inside)
        for projection in experts.projections:
            own = partition_of(experts, projection, partition)
            if own is not None:
                parallel.stacks[stack_name(name, projection.name)] = (projection.shard_dim, parallel.key_of(own))
        became = f"experts {lengths(over_ep)}" if mesh.ep > 1 else "every expert"
        if mesh.tp > 1:
            became += f", features {lengths(partition)}" if partition else ", replicated over tp"
        outcomes[_Outcome(wildcard(name), became, reason)] += 1
    parallel.rules += _rules(description, plans, mesh, outcomes)


def _rules(
    description: ModelDescription,
    plans: tuple[Mapping[str, str], Mapping[str, str]],
    mesh: Mesh,
    outcomes: Mapping[_Outcome, int],
) -> Iterator[Rule]:
    """Yields a record for each outcome: the styles of all rules for the experts, and what became of them."""
    tp, ep = (expert_rules(description, plan) for plan in plans)
    for (pattern, became, reason), count in outcomes.items():
        asked: dict[str, list[str]] = {}
        for rules, size in ((ep, mesh.ep), (tp, mesh.tp)):
            for rule, style in rules[pattern].items() if size > 1 else ():
                asked.setdefault(rule.rpartition(".")[2], []).append(style)
        styles = ", ".join(f"{leaf}: {' + '.join(dict.fromkeys(each))}" for leaf, each in asked.items()) or "no rule"
        reasons = ("whole experts" if mesh.ep > 1 else "", reason)
        yield Rule(pattern, styles, became, "; ".join(filter(None, reasons)) or "as asked", count)


def _partition_inside(
    experts: ExpertsDescription, layouts: Mapping[Projection, Layout], ranks: int
) -> tuple[Partition | None, str]:
    """Returns a partition of the intermediate features that is legal for every projection, with its alignment.

    Where there is none, returns None and the reason.
    """
    # Each projection's alignments along its own intermediate dim, the preferred one first.
    alignments = {p: layouts[p].alignments((p.out_features, p.in_features), p.shard_dim) for p in experts.projections}
    unaligned = [p.name for p, each in alignments.items() if not each]
    if unaligned:
        return None, f"{experts.intermediate} features, which the quantization blocks of {unaligned[0]} do not divide"
    alignment, enough = 1, False
    for level in range(max(map(len, alignments.values()))):
        steps = {p: each[min(level, len(each) - 1)] for p, each in alignments.items()}
        # Where gate and up are one projection, one feature is two of its rows. Its alignment counts rows, so it cannot
        # go into the lcm over features: larger multiples are tried below until its rows are aligned, too.
        alignment = math.lcm(
            *(step for p, step in steps.items() if p.shard_dim == 1 or p.out_features == experts.intermediate)
        )
        for multiple in MULTIPLES:
            partition = even_partition(experts.intermediate, alignment * multiple, ranks)
            if partition is None:  # fewer multiples than ranks, and larger ones are fewer still
                break
            enough = True
            own = ((partition_of(experts, p, partition), step) for p, step in steps.items())
            if all(each is None or each.legal(step) for each, step in own):
                return partition, f"features in multiples of {alignment * multiple}"
    if enough:
        packed = next(p for p in alignments if p.shard_dim == 0)
        fault = f"no partition of gate and up, {experts.intermediate} features each"
        return None, f"{fault}, is aligned with the quantization blocks of {packed.name}"
    return None, f"{experts.intermediate} features are fewer than {ranks} multiples of {alignment}"


def partition_of(experts: ExpertsDescription, projection: Projection, partition: Partition | None) -> Partition | None:
    """Returns the partition of a projection's own dim that follows from that of the intermediate features."""
    if partition is None or projection.shard_dim == 1 or projection.out_features == experts.intermediate:
        return partition
    # Gate and up in one projection: row by row in turns, or all of gate before all of up.
    return partition.scaled(2) if experts.interleaved else join_partitions([partition, partition])


def expert_name(stack: str, number: int) -> str:
    """Returns the name of one expert's part of a stack."""
    return stack.replace(STAR, str(number))


def experts_of(tensor: TensorPlan, tensors: Mapping[str, tuple[int, ...]]) -> Iterator[TensorPlan]:
    """Yields one entry for each expert of a stack, as if it were a module of its own; else the tensor itself.

    Args:
        tensor: of a plan.
        tensors: shape of each checkpoint tensor.
    """
    if tensor.experts is None:
        yield tensor
        return
    count, *shape = tensor.shape
    for number, sources in enumerate(sources_by_expert(tensor.sources, count, tensors)):
        # Not `replace`: there may be tens of thousands.
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


def first_expert(tensor: TensorPlan) -> TensorPlan:
    """Returns the first expert of a stack, without its sources; a tensor that is not a stack is returned as it is."""
    if tensor.experts is None:
        return tensor
    dim = None if tensor.shard_dim is None else tensor.shard_dim - 1
    return replace(
        tensor, name=expert_name(tensor.name, 0), shape=tensor.shape[1:], shard_dim=dim, experts=None, sources=()
    )
