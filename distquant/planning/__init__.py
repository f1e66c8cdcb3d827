"""Decisions, from configurations and headers alone: no device, no process group."""

from distquant.planning.load_plan import (
    AttentionShard,
    ExpertsShard,
    LoadPlan,
    ModuleShard,
    RankMemory,
    Rule,
    TensorPlan,
)
from distquant.sharding.heads import HeadPartition, head_partitions
from distquant.sharding.partition import Partition, even_partition

__all__ = [
    "AttentionShard",
    "ExpertsShard",
    "HeadPartition",
    "LoadPlan",
    "ModuleShard",
    "Partition",
    "RankMemory",
    "Rule",
    "TensorPlan",
    "even_partition",
    "head_partitions",
]
