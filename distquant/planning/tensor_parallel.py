"""Rewrites a model's tensor-parallel plan into cuts that are exact for the quantization in use.

The model's plan says which projections are column- and row-parallel. Projections of one module form a cut group (gate
and up outputs with down inputs; q, k and v outputs with o inputs): all get one cut, at a unit that is legal for every
member. What cannot be cut exactly is replicated, and every rule keeps a record of what became of it and why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from distquant.model.description import Attention, Linear, ModelDescription, wildcard
from distquant.planning.load_plan import AttentionShard, ExpertsShard, ModuleShard, Rule
from distquant.sharding.heads import HeadPartition, cut_heads
from distquant.sharding.layout import PLAIN_STEPS, Layout
from distquant.sharding.partition import Partition, even_partition, join_partitions

COLUMN = {"colwise", "colwise_rep", "colwise_gather_output"}
ROW = {"rowwise", "rowwise_rep", "rowwise_split_input"}
GATHERED = {"colwise_rep", "colwise_gather_output"}
REPLICATED = {"replicated_with_grad_allreduce", "replicate"}
PACKED_MLP = ("gate_up_proj", "gate_up", "up_gate_proj")

# What became of a module: how `assemble/` wraps it.
COLWISE, COLWISE_GATHER, ROWWISE, ROWWISE_SPLIT = "colwise", "colwise_gather", "rowwise", "rowwise_split"
VOCAB_EMBEDDING, GRAD_REDUCE = "vocab_embedding", "grad_reduce"


class NoCut(Exception):
    """A group cannot be cut; says why."""


@dataclass
class ParallelPlan:
    """The rewritten plan: cuts by key, what each module became, and the story of every rule."""

    partitions: dict[str, Partition] = field(default_factory=dict)
    heads: dict[str, HeadPartition] = field(default_factory=dict)
    modules: dict[str, ModuleShard] = field(default_factory=dict)
    attentions: dict[str, AttentionShard] = field(default_factory=dict)
    experts: dict[str, ExpertsShard] = field(default_factory=dict)
    stacks: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Stack of experts -> the dim of an expert's weight that is cut, and the key of its cut."""
    replicated: dict[str, str] = field(default_factory=dict)
    """Modules whose rule asked for a cut that they cannot have -> why."""
    rules: list[Rule] = field(default_factory=list)

    def key_of(self, partition: Partition) -> str:
        """The key of a cut; equal cuts share one."""
        key = next((known for known, other in self.partitions.items() if other == partition), None)
        if key is None:
            key = f"cut{len(self.partitions)}"
            self.partitions[key] = partition
        return key


LayoutOf = Callable[[str], Layout]
"""Layout of a linear module's weight, by module name."""


def rewrite_tp_plan(
    description: ModelDescription, tp_plan: dict[str, str], ranks: int, layout_of: LayoutOf
) -> ParallelPlan:
    """Cuts a model over `ranks`.

    Args:
        skeleton: the model.
        tp_plan: the model's plan after the scheme's `update_tp_plan` hook, without the rules for experts of known form
            (`planning.experts`).
        ranks: size of the tp axis, above 1.
        layout_of: how each linear weight is stored.
    """
    return _Rewriter(description, tp_plan, ranks, layout_of).run()


class _Rewriter:
    def __init__(self, description: ModelDescription, tp_plan: dict[str, str], ranks: int, layout_of: LayoutOf):
        self.description, self.ranks, self.layout_of = description, ranks, layout_of
        self.plan = ParallelPlan()
        self.tp_plan = tp_plan
        self.became: dict[tuple[str, str, str, str], int] = {}
        self._heads: dict[object, tuple[HeadPartition, dict[str, Partition]]] = {}
        self._widths: dict[object, tuple[int, Partition]] = {}

    def run(self) -> ParallelPlan:
        groups: dict[str, dict[str, str]] = {}
        matched: set[str] = set()
        for name in (*self.description.modules, *self.description.params):
            style = self.tp_plan.get(wildcard(name)) or self.tp_plan.get(name)
            if style is not None:
                matched.add(wildcard(name) if wildcard(name) in self.tp_plan else name)
                groups.setdefault(name.rpartition(".")[0], {})[name] = style
        vocabulary = {self.description.input_embedding, self.description.output_embedding}
        for parent, asked in groups.items():
            rest = {name: style for name, style in asked.items() if name not in vocabulary}
            if rest:
                self._group(parent, rest)
        self._vocabulary()
        for pattern, style in self.tp_plan.items():
            if pattern not in matched:
                self._tell(pattern, style, "unused", "no module of this model matches")
        self.plan.rules = [Rule(*key, modules=count) for key, count in self.became.items()]
        return self.plan

    # -- groups ----------------------------------------------------------------------------------------------------

    def _group(self, parent: str, asked: dict[str, str]) -> None:
        for name in [name for name in asked if self._is_unknown_expert(name)]:
            self._tell(name, asked.pop(name), "replicate", "experts of this form are kept whole on every rank of tp")
        reduced = [name for name, style in asked.items() if style in REPLICATED]
        linears = {n: s for n, s in asked.items() if n not in reduced}
        try:
            if linears:
                self._cut_group(parent, linears)
            for name in reduced:
                if parent in self.plan.attentions and asked[name] == "replicated_with_grad_allreduce":
                    self.plan.modules[name] = ModuleShard(GRAD_REDUCE, "")
                self._tell(name, asked[name], "replicate", "as asked")
        except NoCut as why:
            for name, style in asked.items():
                self.plan.replicated[name] = str(why)
                self._tell(name, style, "replicate", str(why))

    def _is_unknown_expert(self, name: str) -> bool:
        return any(name == known or name.startswith(known + ".") for known in self.description.unknown_experts)

    def _cut_group(self, parent: str, asked: dict[str, str]) -> None:
        unknown = {n: s for n, s in asked.items() if s not in COLUMN | ROW or n not in self.description.linears}
        if unknown:
            name, style = next(iter(unknown.items()))
            kind = "style" if name in self.description.linears else "module for style"
            raise NoCut(f"{wildcard(name)} has a {kind} {style!r} that has no exact quantized form yet")
        columns = [self.description.linears[n] for n, s in asked.items() if s in COLUMN]
        rows = [self.description.linears[n] for n, s in asked.items() if s in ROW]
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
        if "whole" in roles.values():
            self._each_alone(columns, [row], asked)
            return
        key = ("attention", attention.heads, attention.kv_heads, attention.head_dim, *self._signature(columns, row))
        key = (*key, *roles.values())
        if key not in self._heads:
            self._heads[key] = self._solve_attention(attention, columns, row, roles)
        heads, by_role = self._heads[key]
        size = attention.head_dim
        self.plan.attentions[attention.name] = AttentionShard(self._heads_key(heads), size)
        for column in columns:
            self._cut_module(column.name, COLWISE, by_role[roles[column.name]], asked, self._heads_told(heads))
        self._cut_module(row.name, ROWWISE, by_role["query"], asked, self._heads_told(heads))

    def _role(self, attention: Attention, linear: Linear, style: str) -> str:
        """What a column-parallel projection of an attention module holds."""
        query, kv = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        if linear.out_features == query + 2 * kv:
            return "per head" if style == "colwise" and query == kv else "packed"
        if style in GATHERED:
            return "whole"
        if linear.out_features == query:
            return "query"
        if linear.out_features == kv:
            return "kv"
        raise NoCut(f"{wildcard(linear.name)} has {linear.out_features} outputs, neither query nor kv heads")

    def _solve_attention(
        self, attention: Attention, columns: list[Linear], row: Linear, roles: dict[str, str]
    ) -> tuple[HeadPartition, dict[str, Partition]]:
        if self.ranks > attention.heads:
            raise NoCut(f"{attention.heads} query heads are fewer than {self.ranks} ranks")
        size = attention.head_dim
        for level in range(self._levels([*columns, row])):
            alignments = {c.name: self._unit(c, 0, level) for c in columns} | {row.name: self._unit(row, 1, level)}
            for heads in cut_heads(attention.heads, attention.kv_heads, self.ranks):
                query, kv = heads.query.scaled(size), heads.kv.scaled(size)
                partitions = {"query": query, "kv": kv, "packed": join_partitions([query, kv, kv])}
                partitions["per head"] = heads.query.scaled(3 * size)
                used = [(partitions[roles[c.name]], alignments[c.name]) for c in columns] + [
                    (query, alignments[row.name])
                ]
                if all(partition.legal(alignment) for partition, alignment in used):
                    return heads, partitions
        smallest = math.lcm(*(self._unit(c, 0, -1) for c in columns), self._unit(row, 1, -1))
        raise NoCut(f"no cut of {attention.heads} heads of {size} over {self.ranks} ranks falls on units of {smallest}")

    def _heads_told(self, heads: HeadPartition) -> str:
        told = "whole kv heads" if not heads.kv.repeated else f"{heads.kv.repeated} kv heads are repeated"
        return f"{told}; query heads {lengths(heads.query)}, kv heads {lengths(heads.kv)}"

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
        if any(c.name not in packed and (c.out_features != width or asked[c.name] in GATHERED) for c in columns):
            self._each_alone(columns, [row], asked)
            return
        key = ("mlp", width, len(packed), *self._signature(columns, row))
        if key not in self._widths:
            self._widths[key] = self._solve_mlp(width, columns, row, packed)
        alignment, partition = self._widths[key]
        told = f"units of {alignment} for {', '.join(c.name.rpartition('.')[2] for c in (*columns, row))}"
        for column in columns:
            used = join_partitions([partition, partition]) if column.name in packed else partition
            self._cut_module(column.name, COLWISE, used, asked, told)
        self._cut_module(row.name, ROWWISE, partition, asked, told)

    def _solve_mlp(self, width: int, columns: list[Linear], row: Linear, packed: set[str]) -> tuple[int, Partition]:
        alignment = 1
        for level in range(self._levels([*columns, row])):
            alignment = math.lcm(*(self._unit(c, 0, level) for c in columns), self._unit(row, 1, level))
            partition = even_partition(width, alignment, self.ranks)
            if partition and all(
                join_partitions([partition, partition]).legal(self._unit(c, 0, level))
                for c in columns
                if c.name in packed
            ):
                return alignment, partition
        raise NoCut(
            f"{width} features are {-(-width // alignment)} units of {alignment}, fewer than {self.ranks} ranks"
        )

    def _each_alone(self, columns: list[Linear], rows: list[Linear], asked: dict[str, str]) -> None:
        """Honors rules that gather a projection's output and split the next one's input: no group, own cuts."""
        chosen = []
        for linear, dim, styles, became in (
            *((c, 0, GATHERED, COLWISE_GATHER) for c in columns),
            *((r, 1, {"rowwise_split_input", "rowwise_rep"}, ROWWISE_SPLIT) for r in rows),
        ):
            if asked[linear.name] not in styles:
                raise NoCut(f"{wildcard(linear.name)} ({asked[linear.name]}) has no partner with the same features")
            found = next(self._own_cuts(linear, dim), None)
            if found is None:
                raise NoCut(f"{wildcard(linear.name)} has fewer units than {self.ranks} ranks")
            chosen.append((linear.name, became, *found))
        for name, became, partition, alignment in chosen:  # only once every member has a cut
            self._cut_module(name, became, partition, asked, f"on its own, units of {alignment}")

    def _own_cuts(self, linear: Linear, dim: int) -> Iterator[tuple[Partition, int]]:
        size = linear.in_features if dim else linear.out_features
        for alignment in self.layout_of(linear.name).alignments((linear.out_features, linear.in_features), dim):
            partition = even_partition(size, alignment, self.ranks)
            if partition is not None:
                yield partition, alignment

    def _vocabulary(self) -> None:
        """Embedding and head are cut over the vocabulary, with one cut where they are tied."""
        embedding, head = self.description.input_embedding, self.description.output_embedding
        shared: tuple[Partition, int] | None = None
        tied = f"{head}.weight" in self.description.tied or f"{embedding}.weight" in self.description.tied
        if head is not None and head in self.description.linears:
            shared = next(self._own_cuts(self.description.linears[head], 0), None)
            self._vocabulary_module(head, COLWISE_GATHER, shared, tied)
        else:
            tied = False
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
        together = ", embedding and head are tied: one cut" if tied else ""
        if partition is None:
            self._tell(name, asked[name], "replicate", f"fewer units than ranks{together}")
        else:
            told = f"over the vocabulary, units of {partition[1]}{together}"
            self._cut_module(name, style, partition[0], asked, told)

    # -- shared ----------------------------------------------------------------------------------------------------

    def _signature(self, columns: list[Linear], row: Linear) -> tuple[object, ...]:
        described = ((c.out_features, c.in_features, self.layout_of(c.name)) for c in (*columns, row))
        return tuple(described)

    def _levels(self, linears: list[Linear]) -> int:
        every = [self._units(x, dim) for x in linears for dim in (0, 1)]
        return max((len(alignments) for alignments in every), default=1) or 1

    def _units(self, linear: Linear, dim: int) -> tuple[int, ...]:
        return self.layout_of(linear.name).alignments((linear.out_features, linear.in_features), dim)

    def _unit(self, linear: Linear, dim: int, level: int) -> int:
        alignments = self._units(linear, dim)
        if not alignments:
            side = "inputs" if dim else "outputs"
            count = linear.in_features if dim else linear.out_features
            raise NoCut(f"{wildcard(linear.name)} has {count} {side}, which its quantization blocks do not divide")
        return alignments[min(level, len(alignments) - 1)]

    def _cut_module(self, name: str, style: str, partition: Partition, asked: dict[str, str], reason: str) -> None:
        self.plan.modules[name] = ModuleShard(style, self.plan.key_of(partition))
        self._tell(name, asked[name], f"{style} {lengths(partition)}", reason)

    def _tell(self, name: str, asked: str, became: str, reason: str) -> None:
        key = (wildcard(name), asked, became, reason)
        self.became[key] = self.became.get(key, 0) + 1


def lengths(partition: Partition) -> str:
    """Local lengths in words: `384+320`, or the range of them where there are many ranks."""
    lengths = partition.lengths
    if len(lengths) <= 4:
        return "+".join(map(str, lengths))
    smallest, largest = min(lengths), max(lengths)
    each = str(largest) if smallest == largest else f"{smallest} to {largest}"
    return f"{len(lengths)} x {each}"
