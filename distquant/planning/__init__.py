"""Pure arithmetic: cuts, heads, rules and memory. No I/O, no device, no process group."""

from distquant.planning.load_plan import (
    AttentionShard,
    ExpertsShard,
    LoadPlan,
    ModuleShard,
    RankMemory,
    Rule,
    TensorPlan,
)
from distquant.sharding.heads import HeadCut, cut_heads
from distquant.sharding.partition import Cut, even_cut

__all__ = [
    "AttentionShard",
    "Cut",
    "ExpertsShard",
    "HeadCut",
    "LoadPlan",
    "ModuleShard",
    "RankMemory",
    "Rule",
    "TensorPlan",
    "cut_heads",
    "even_cut",
]
