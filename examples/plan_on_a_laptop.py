"""Plans a load over eight GPUs on a machine without GPUs: reads configs and headers, and no weights.

Run it with `python examples/plan_on_a_laptop.py [MODEL]`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import distquant as dq

path = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "models" / "kjv-tiny")

plan = dq.plan(path, quantization_config="nf4-dq", mesh="tp=8", max_memory="24GiB", capability=(8, 0))
print(plan)

# The plan is data: a digest names it, JSON carries it, and `dq.load(plan)` executes it.
fullest = max(plan.memory, key=lambda row: row.peak)
print(f"\nfullest rank: {fullest.rank} with {fullest.peak:,} bytes at most")
print(f"digest {plan.digest}, {len(plan.to_json()):,} bytes of JSON")

# An impossible plan fails here, with every problem in one error.
try:
    dq.plan(path, quantization_config="nf4-dq", mesh="tp=8", max_memory="64MiB", staging="80MiB")
except dq.InputError as error:
    print(f"\nwith 64 MiB a rank:\n{error}")
