"""What ranks do whose process group is the caller's, and whose machines differ."""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist

import distquant as dq
from distquant.runtime import measure

PROMPT = [[1, 17, 43, 9]]


def in_a_group_of_gpus_alone(path: str, store: str) -> tuple[str, list[int]]:
    """Fingerprint and drawn tokens, where the default group takes tensors of GPUs alone, as one of NCCL does."""
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("cuda:gloo", f"file://{store}", limit, rank=rank, world_size=world)
    model = dq.load(path, quantization_config="nf4-dq", mesh="tp=2")
    torch.manual_seed(rank)  # rank 0's state is taken over
    drawn = model.generate(torch.tensor(PROMPT), max_new_tokens=6, do_sample=True, pad_token_id=0)
    return dq.fingerprint(model), drawn[0].tolist()


def with_less_memory_on_rank_1(path: str) -> dict[str, Any]:
    """What the plan says of memory, where rank 1's machine has less of it free."""
    whole = measure.host_memory
    if dist.get_rank() == 1:
        measure.host_memory = lambda: 2 << 30
    try:
        environment = dq.load(path, quantization_config="nf4", mesh="tp=2").distquant.plan.environment
    finally:
        measure.host_memory = whole
    return {"memory": environment.memory, "source": environment.memory_source}
