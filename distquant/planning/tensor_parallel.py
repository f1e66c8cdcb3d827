"""Rewrites a model's tensor-parallel plan into partitions that are exact for the quantization in use.

The model's plan says which projections are column- and row-parallel. Projections of one module are a group (gate and up
outputs with down inputs; q, k and v outputs with o inputs). All members of a group get one partition, at an alignment
that is legal for every member. What cannot be sharded exactly is replicated, and every rule has a record of what became
of it and why.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator

from distquant.model.description import Attention, Linear, ModelDescription, wildcard
from distquant.planning.load_plan import AttentionShard, ModuleShard, Rule
from distquant.planning.parallel_plan import (
    COLWISE,
    COLWISE_GATHER,
    GRAD_REDUCE,
    ROWWISE,
    ROWWISE_SPLIT,
    VOCAB_EMBEDDING,
    ParallelPlan,
    lengths,
)
from distquant.sharding.heads import HeadPartition, head_partitions
from distquant.sharding.layout import PLAIN_STEPS, Layout
from distquant.sharding.partition import Partition, even_partition, join_partitions

__all__ = [
    "COLWISE",
    "COLWISE_GATHER",
    "GRAD_REDUCE",
    "ROWWISE",
    "ROWWISE_SPLIT",
    "VOCAB_EMBEDDING",
    "ParallelPlan",
    "rewrite_tp_plan",
]

COLUMN_STYLES = {"colwise", "colwise_rep", "colwise_gather_output"}
ROW_STYLES = {"rowwise", "rowwise_rep", "rowwise_split_input"}
GATHER_STYLES = {"colwise_rep", "colwise_gather_output"}
SPLIT_STYLES = {"rowwise_split_input", "rowwise_rep"}
REPLICATED_STYLES = {"replicated_with_grad_allreduce", "replicate"}
PACKED_MLP = ("gate_up_proj", "gate_up", "up_gate_proj")
"""Last parts of the names of projections that hold gate and up."""


class NotSharded(Exception):
    """A group cannot be sharded; the message is the reason."""


LayoutOf = Callable[[str], Layout]
"""Gives the layout of a linear module's weight by the module's name."""


def rewrite_tp_plan(
    description: ModelDescription, tp_plan: dict[str, str], ranks: int, layout_of: LayoutOf
) -> ParallelPlan:
    """Shards a model over `ranks`.

    Args:
        description: of the model.
        tp_plan: the model's plan after the scheme's `update_tp_plan` hook, without the rules for experts of known form
            (`planning.expert_parallel`).
        ranks: size of the tp axis, above 1.
        layout_of: gives the layout of a linear weight.
    """
    return _Rewriter(description, tp_plan, ranks, layout_of).run()


class _Rewriter:
    def __init__(self, description: ModelDescription, tp_plan: dict[str, str], ranks: int, layout_of: LayoutOf):
        self.description, self.ranks, self.layout_of = description, ranks, layout_of
        self.plan = ParallelPlan()
        self.tp_plan = tp_plan
        self.records: Counter[tuple[str, str, str, str]] = Counter()
        self._solved_heads: dict[object, tuple[HeadPartition, dict[str, Partition]]] = {}
        self._solved_widths: dict[object, tuple[int, Partition]] = {}

    def run(self) -> ParallelPlan:
        groups: dict[str, dict[str, str]] = {}
        matched: set[str] = set()
        for name in (*self.description.modules, *self.description.params):
            style = self.tp_plan.get(wildcard(name)) or self.tp_plan.get(name)
            if style is not None:
                matched.add(wildcard(name) if wildcard(name) in self.tp_plan else name)
                groups.setdefault(name.rpartition(".")[0], {})[name] = style
        # Embedding and head may be tied, whatever their rules say, so they are sharded together at the end.
        vocabulary = {self.description.input_embedding, self.description.output_embedding}
        for parent, asked in groups.items():
            rest = {name: style for name, style in asked.items() if name not in vocabulary}
            if rest:
                self._group(parent, rest)
        self._vocabulary()
        for pattern, style in self.tp_plan.items():
            if pattern not in matched:
                self._record(pattern, style, "unused", "no module of this model matches")
        self.plan.rules = [Rule(*key, modules=count) for key, count in self.records.items()]
        return self.plan

    # -- groups ----------------------------------------------------------------------------------------------------

    def _group(self, parent: str, asked: dict[str, str]) -> None:
        for name in [name for name in asked if self._is_unknown_expert(name)]:
            self._record(name, asked.pop(name), "replicate", "experts of this form are replicated over tp")
        reduced = [name for name, style in asked.items() if style in REPLICATED_STYLES]
        linears = {n: s for n, s in asked.items() if n not in reduced}
        # A group is sharded as one or not at all: outputs that one member splits are the inputs of the next.
        try:
            if linears:
                self._shard_group(parent, linears)
            for name in reduced:
                if parent in self.plan.attentions and asked[name] == "replicated_with_grad_allreduce":
                    self.plan.modules[name] = ModuleShard(GRAD_REDUCE, "")
                self._record(name, asked[name], "replicate", "as asked")
        except NotSharded as reason:
            for name, style in asked.items():
                self.plan.replicated[name] = str(reason)
                self._record(name, style, "replicate", str(reason))

    def _is_unknown_expert(self, name: str) -> bool:
        return any(name == known or name.startswith(known + ".") for known in self.description.unknown_experts)

    def _shard_group(self, parent: str, asked: dict[str, str]) -> None:
        known = COLUMN_STYLES | ROW_STYLES
        unknown = {n: s for n, s in asked.items() if s not in known or n not in self.description.linears}
        if unknown:
            name, style = next(iter(unknown.items()))
            kind = "style" if name in self.description.linears else "module for style"
            raise NotSharded(f"{wildcard(name)} has a {kind} {style!r} that has no exact quantized form yet")
        columns = [self.description.linears[n] for n, s in asked.items() if s in COLUMN_STYLES]
        rows = [self.description.linears[n] for n, s in asked.items() if s in ROW_STYLES]
        attention = self.description.attentions.get(parent)
        if attention is not None and len(rows) == 1 and rows[0].in_features == attention.heads * attention.head_dim:
            self._attention(attention, columns, rows[0], asked)
        elif len(rows) == 1 and columns:
            self._mlp(columns, rows[0], asked)
        else:
            self._each_alone(columns, rows, asked)

    # -- attention -------------------------------------------------------------------------------------------------

    def _attention(self, attention: Attention, columns: list[Linear], row: Linear, asked: dict[str, str]) -> None:
        roles = {c.name: self._role(attention, c, asked[c.name]) for c in columns}
        if "own" in roles.values():
            self._each_alone(columns, [row], asked)
            return
        sizes = (attention.heads, attention.kv_heads, attention.head_dim, attention.together)
        key = ("attention", *sizes, *self._signature(columns, row), *roles.values())
        if key not in self._solved_heads:
            self._solved_heads[key] = self._solve_attention(attention, columns, row, roles)
        heads, by_role = self._solved_heads[key]
        size = attention.head_dim
        self.plan.attentions[attention.name] = AttentionShard(self._heads_key(heads), size)
        for column in columns:
            self._shard_module(column.name, COLWISE, by_role[roles[column.name]], asked, _describe_heads(heads))
        self._shard_module(row.name, ROWWISE, by_role["query"], asked, _describe_heads(heads))

    def _role(self, attention: Attention, linear: Linear, style: str) -> str:
        """Returns what a column-parallel projection of attention holds, or "own" for a partition of its own."""
        query, kv = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        if linear.out_features == query + 2 * kv:
            return "per head" if style == "colwise" and query == kv else "packed"
        if style in GATHER_STYLES:
            return "own"
        if linear.out_features == query:
            return "query"
        if linear.out_features == kv:
            return "kv"
        raise NotSharded(f"{wildcard(linear.name)} has {linear.out_features} outputs, neither query nor kv heads")

    def _solve_attention(
        self, attention: Attention, columns: list[Linear], row: Linear, roles: dict[str, str]
    ) -> tuple[HeadPartition, dict[str, Partition]]:
        blocks, together = attention.heads // attention.together, attention.together
        if self.ranks > blocks:
            few = f"{attention.heads} query heads are" + (f" packed in {blocks} blocks," if together > 1 else "")
            raise NotSharded(f"{few} fewer than {self.ranks} ranks")
        size = attention.head_dim
        # Preferred alignments first (they keep kernels fast), then finer ones that are still exact.
        for level in range(self._levels([*columns, row])):
            alignments = {c.name: self._alignment(c, 0, level) for c in columns}
            alignments[row.name] = self._alignment(row, 1, level)
            # Whole kv heads first, then repeated ones.
            for heads in head_partitions(attention.heads, attention.kv_heads, self.ranks):
                query, kv = heads.query.scaled(size), heads.kv.scaled(size)
                partitions = {"query": query, "kv": kv, "packed": join_partitions([query, kv, kv])}
                # One head's q, k and v follow each other (GPT-NeoX): a head is three times as many rows.
                partitions["per head"] = heads.query.scaled(3 * size)
                used = [(partitions[roles[c.name]], alignments[c.name]) for c in columns] + [
                    (query, alignments[row.name])
                ]
                if heads.query.legal(together) and all(partition.legal(alignment) for partition, alignment in used):
                    return heads, partitions
        smallest = math.lcm(*(self._alignment(c, 0, -1) for c in columns), self._alignment(row, 1, -1))
        fault = f"no partition of {attention.heads} heads of {size} over {self.ranks} ranks"
        raise NotSharded(f"{fault} is aligned to {smallest}")

    def _heads_key(self, heads: HeadPartition) -> str:
        for key, known in self.plan.heads.items():
            if known == heads:
                return key
        key = f"heads{len(self.plan.heads)}"
        self.plan.heads[key] = heads
        return key

    # -- everything else -------------------------------------------------------------------------------------------

    def _mlp(self, columns: list[Linear], row: Linear, asked: dict[str, str]) -> None:
        width = row.in_features
        packed = {c.name for c in columns if c.out_features == 2 * width and c.name.endswith(PACKED_MLP)}
        if any(c.name not in packed and (c.out_features != width or asked[c.name] in GATHER_STYLES) for c in columns):
            self._each_alone(columns, [row], asked)
            return
        key = ("mlp", width, len(packed), *self._signature(columns, row))
        if key not in self._solved_widths:
            self._solved_widths[key] = self._solve_mlp(width, columns, row, packed)
        alignment, partition = self._solved_widths[key]
        reason = f"multiples of {alignment} for {', '.join(c.name.rpartition('.')[2] for c in (*columns, row))}"
        for column in columns:
            used = join_partitions([partition, partition]) if column.name in packed else partition
            self._shard_module(column.name, COLWISE, used, asked, reason)
        self._shard_module(row.name, ROWWISE, partition, asked, reason)

    def _solve_mlp(self, width: int, columns: list[Linear], row: Linear, packed: set[str]) -> tuple[int, Partition]:
        alignment = 1
        # The outputs of gate and up are the inputs of down: one partition, on the grid of all three.
        for level in range(self._levels([*columns, row])):
            alignment = math.lcm(*(self._alignment(c, 0, level) for c in columns), self._alignment(row, 1, level))
            partition = even_partition(width, alignment, self.ranks)
            # Gate and up in one projection: up begins where gate ends, which must be on its grid, too.
            if partition and all(
                join_partitions([partition, partition]).legal(self._alignment(c, 0, level))
                for c in columns
                if c.name in packed
            ):
                return alignment, partition
        raise NotSharded(
            f"{width} features are {-(-width // alignment)} multiples of {alignment}, fewer than {self.ranks} ranks"
        )

    def _each_alone(self, columns: list[Linear], rows: list[Linear], asked: dict[str, str]) -> None:
        """Honors rules that gather a projection's output, or split the next one's input: each has its own partition."""
        chosen = []
        for linear, dim, styles, became in (
            *((c, 0, GATHER_STYLES, COLWISE_GATHER) for c in columns),
            *((r, 1, SPLIT_STYLES, ROWWISE_SPLIT) for r in rows),
        ):
            if asked[linear.name] not in styles:
                name = wildcard(linear.name)
                raise NotSharded(f"{name} ({asked[linear.name]}) has no partner with the same features")
            own = next(self._own_partitions(linear, dim), None)
            if own is None:
                name = wildcard(linear.name)
                raise NotSharded(f"{name} has fewer multiples of its alignment than {self.ranks} ranks")
            chosen.append((linear.name, became, *own))
        for name, became, partition, alignment in chosen:  # only once every member has a partition
            self._shard_module(name, became, partition, asked, f"on its own, multiples of {alignment}")

    def _own_partitions(self, linear: Linear, dim: int) -> Iterator[tuple[Partition, int]]:
        size = linear.in_features if dim else linear.out_features
        for alignment in self.layout_of(linear.name).alignments((linear.out_features, linear.in_features), dim):
            partition = even_partition(size, alignment, self.ranks)
            if partition is not None:
                yield partition, alignment

    def _vocabulary(self) -> None:
        """Shards embedding and head over the vocabulary, with one partition if they are tied."""
        embedding, head = self.description.input_embedding, self.description.output_embedding
        shared: tuple[Partition, int] | None = None
        tied = f"{head}.weight" in self.description.tied or f"{embedding}.weight" in self.description.tied
        if head is not None and head in self.description.linears:
            shared = next(self._own_partitions(self.description.linears[head], 0), None)
            self._vocabulary_module(head, COLWISE_GATHER, shared, tied)
        else:
            tied = False  # with what the model does not have
        rows = self.description.params[f"{embedding}.weight"].shape[0] if self._is_plain_embedding(embedding) else 0
        if embedding is not None and rows:
            if not tied and (shared is None or shared[0].size != rows):
                partitions = ((even_partition(rows, alignment, self.ranks), alignment) for alignment in PLAIN_STEPS)
                shared = next(
                    ((partition, alignment) for partition, alignment in partitions if partition is not None), None
                )
            self._vocabulary_module(embedding, VOCAB_EMBEDDING, shared, tied)

    def _is_plain_embedding(self, name: str | None) -> bool:
        return name in self.description.embeddings and f"{name}.weight" in self.description.params

    def _vocabulary_module(self, name: str, style: str, partition: tuple[Partition, int] | None, tied: bool) -> None:
        asked = {name: self.tp_plan.get(wildcard(name)) or "no rule"}
        together = ", embedding and head are tied: one partition" if tied else ""
        if partition is None:
            self._record(name, asked[name], "replicate", f"fewer multiples of the alignment than ranks{together}")
        else:
            reason = f"over the vocabulary, multiples of {partition[1]}{together}"
            self._shard_module(name, style, partition[0], asked, reason)

    # -- shared ----------------------------------------------------------------------------------------------------

    def _signature(self, columns: list[Linear], row: Linear) -> tuple[object, ...]:
        described = ((c.out_features, c.in_features, self.layout_of(c.name)) for c in (*columns, row))
        return tuple(described)

    def _levels(self, linears: list[Linear]) -> int:
        every = [self._alignments(x, dim) for x in linears for dim in (0, 1)]
        return max((len(alignments) for alignments in every), default=1) or 1

    def _alignments(self, linear: Linear, dim: int) -> tuple[int, ...]:
        return self.layout_of(linear.name).alignments((linear.out_features, linear.in_features), dim)

    def _alignment(self, linear: Linear, dim: int, level: int) -> int:
        alignments = self._alignments(linear, dim)
        if not alignments:
            side = "inputs" if dim else "outputs"
            count = linear.in_features if dim else linear.out_features
            raise NotSharded(f"{wildcard(linear.name)} has {count} {side}, which its quantization blocks do not divide")
        return alignments[min(level, len(alignments) - 1)]

    def _shard_module(self, name: str, style: str, partition: Partition, asked: dict[str, str], reason: str) -> None:
        self.plan.modules[name] = ModuleShard(style, self.plan.key_of(partition))
        self._record(name, asked[name], f"{style} {lengths(partition)}", reason)

    def _record(self, name: str, asked: str, became: str, reason: str) -> None:
        self.records[(wildcard(name), asked, became, reason)] += 1


def _describe_heads(heads: HeadPartition) -> str:
    kv = "whole kv heads" if not heads.kv.repeated else f"{heads.kv.repeated} kv heads are repeated"
    return f"{kv}; query heads {lengths(heads.query)}, kv heads {lengths(heads.kv)}"
