"""QLoRA on a sharded model: 4-bit weights partitioned over two ranks, PEFT's adapters, a few steps of training.

    torchrun --standalone --nproc-per-node 2 examples/sharded_lora.py [MODEL] [STEPS]

Every rank sees the same batches and holds the adapters of its own part. Of a column-parallel projection `lora_A` is
replicated and `lora_B` partitioned by outputs; of a row-parallel one `lora_A` is partitioned by inputs and `lora_B`
replicated. distquant sums the gradients of replicated adapters, so an ordinary optimizer keeps the copies equal.

Three rules:
- the same seed and the same data on all ranks (a sharded model is one model);
- `lora_dropout=0`: each rank would drop different elements;
- no adapters on `embed_tokens`, and none on `k_proj` and `v_proj` where kv heads are repeated (distquant refuses both).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

import distquant as dq

HERE = Path(__file__).parent
WINDOW, BATCH, BATCHES = 64, 8, 2


def batches(tokenizer) -> list[torch.Tensor]:
    """`BATCHES` batches of token ids `[BATCH, WINDOW]` from the beginning of the validation text."""
    text = (HERE / "models" / "kjv-tiny" / "validation.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    return list(ids[: BATCHES * BATCH * WINDOW].view(BATCHES, BATCH, WINDOW))


def main() -> None:
    path = sys.argv[1] if len(sys.argv) > 1 else str(HERE / "models" / "kjv-tiny")
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    torch.manual_seed(0)

    model = dq.load(path, quantization_config="nf4-dq", mesh=f"tp={os.environ['WORLD_SIZE']}")
    before = dq.fingerprint(model)
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=targets))
    model.train()

    data = batches(AutoTokenizer.from_pretrained(path))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    losses = []
    for step in range(steps):
        ids = data[step % BATCHES].to(model.device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, losses)
    after = dq.fingerprint(model)  # all ranks must call it
    if dist.get_rank() == 0:
        for epoch in range(0, steps, BATCHES):
            part = losses[epoch : epoch + BATCHES]
            print(f"epoch {epoch // BATCHES:2}  loss {sum(part) / len(part):.4f}")
        print(f"ranks agree on every loss: {all(theirs == losses for theirs in everyone)}")
        print(f"the quantized weights are untouched: {before == after}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
