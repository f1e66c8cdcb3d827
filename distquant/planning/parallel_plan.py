"""The rewritten parallel plan of a model: partitions, what each module does with them, and a record of every rule."""

from __future__ import annotations

from dataclasses import dataclass, field

from distquant.planning.load_plan import AttentionShard, ExpertsShard, ModuleShard, Rule
from distquant.sharding.heads import HeadPartition
from distquant.sharding.partition import Partition

COLWISE, COLWISE_GATHER, ROWWISE, ROWWISE_SPLIT = "colwise", "colwise_gather", "rowwise", "rowwise_split"
VOCAB_EMBEDDING, GRAD_REDUCE = "vocab_embedding", "grad_reduce"
"""Styles that modules end up with, which `parallel.tensor_parallel` installs."""


@dataclass
class ParallelPlan:
    """The rewritten plan: partitions by key, what each module became, and a record of every rule."""

    partitions: dict[str, Partition] = field(default_factory=dict)
    heads: dict[str, HeadPartition] = field(default_factory=dict)
    modules: dict[str, ModuleShard] = field(default_factory=dict)
    attentions: dict[str, AttentionShard] = field(default_factory=dict)
    experts: dict[str, ExpertsShard] = field(default_factory=dict)
    stacks: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Stack of experts -> the dim of an expert's weight that is sharded, and the key of its partition."""
    replicated: dict[str, str] = field(default_factory=dict)
    """Modules that their rule would shard, and that cannot be -> the reason."""
    rules: list[Rule] = field(default_factory=list)

    def key_of(self, partition: Partition) -> str:
        """Returns the key of a partition, the same one for equal partitions."""
        key = next((known for known, other in self.partitions.items() if other == partition), None)
        if key is None:
            key = f"cut{len(self.partitions)}"
            self.partitions[key] = partition
        return key


def lengths(partition: Partition) -> str:
    """Returns the local lengths for people: `384+320`, or their range where there are many ranks."""
    local = partition.lengths
    if len(local) <= 4:
        return "+".join(map(str, local))
    smallest, largest = min(local), max(local)
    each = str(largest) if smallest == largest else f"{smallest} to {largest}"
    return f"{len(local)} x {each}"
