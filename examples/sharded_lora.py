"""QLoRA on a sharded model: 4-bit weights cut over two ranks, PEFT's adapters on top, a few steps of training.

    torchrun --standalone --nproc-per-node 2 examples/sharded_lora.py [MODEL] [STEPS]

Every rank sees the same batches and holds the adapters of its own part: of a column-parallel projection `lora_A` whole
and its outputs of `lora_B`, of a row-parallel one its inputs of `lora_A` and `lora_B` whole. Gradients of what every
rank holds whole are summed by distquant, so an ordinary optimizer keeps the copies equal.

Three things to keep to:
- the same seed and the same data on all ranks (a sharded model is one model);
- `lora_dropout=0`: each rank would drop other elements;
- no adapters on `embed_tokens`, and none on `k_proj` and `v_proj` where kv heads are repeated (distquant refuses both).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

import distquant as dq
from distquant.runtime import process_group

HERE = Path(__file__).parent
WINDOW, BATCH = 64, 8


def batches(tokenizer, steps: int):
    """`steps` batches of token ids `[BATCH, WINDOW]` from the model's validation text; the same on every rank."""
    text = (HERE / "models" / "kjv-tiny" / "validation.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    for step in range(steps):
        yield rows[torch.arange(step * BATCH, (step + 1) * BATCH) % len(rows)]


def loss_on(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids.to(model.device), labels=ids.to(model.device)).loss


def main() -> None:
    path = sys.argv[1] if len(sys.argv) > 1 else str(HERE / "models" / "kjv-tiny")
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 12
    process_group.init()
    ranks, first = dist.get_world_size(), dist.get_rank() == 0
    torch.manual_seed(0)

    model = dq.load(path, quantization_config="nf4-dq", mesh=f"tp={ranks}")
    before = dq.fingerprint(model)
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=targets))
    model.train()

    tokenizer = AutoTokenizer.from_pretrained(path)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    losses = []
    for step, ids in enumerate(batches(tokenizer, steps)):
        loss = loss_on(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if first:
            print(f"step {step:2}  loss {losses[-1]:.4f}", flush=True)

    everyone = process_group.collect(losses)
    after = dq.fingerprint(model)
    if first:
        start, end = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
        print(f"loss {start:.4f} -> {end:.4f} (means of three steps)")
        print(f"ranks agree on every loss: {all(theirs == losses for theirs in everyone)}")
        print(f"the quantized weights are untouched: {before == after}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
