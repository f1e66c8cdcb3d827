"""LoRA on a rank: adapters whose values are slices of global ones, by the plan's cuts, and gradients to put together."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor
from work import IDS, exact, rank

from distquant.planning.tensor_parallel import COLWISE, COLWISE_GATHER

RANK_OF_LORA = 4
TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")


def wrap(model: Any, targets: tuple[str, ...] = TARGETS) -> Any:
    """The model with PEFT's LoRA, `lora_B` not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(rank())  # ranks draw different initial values on purpose
    config = LoraConfig(r=RANK_OF_LORA, lora_alpha=8, lora_dropout=0.0, target_modules=list(targets))
    return get_peft_model(model, config)


def partition_of(plan: Any, module: str, side: str) -> tuple[int, Any] | None:
    """(dim, cut) of an adapter's matrix: outputs of `lora_B` in column-, inputs of `lora_A` in row-parallel modules."""
    shard = plan.modules.get(module)
    if shard is None:
        return None
    column = shard.style in (COLWISE, COLWISE_GATHER)
    if side == "lora_B" and column:
        return 0, plan.partitions[shard.partition]
    if side == "lora_A" and not column:
        return 1, plan.partitions[shard.partition]
    return None


def adapters(model: Any) -> dict[tuple[str, str], Tensor]:
    """(module path, `lora_A` or `lora_B`) -> this rank's parameter."""
    found = {}
    for name, parameter in model.named_parameters():
        for side in ("lora_A", "lora_B"):
            if f".{side}." in name:
                found[name.removeprefix("base_model.model.").partition(f".{side}.")[0], side] = parameter
    return found


def fill(model: Any) -> None:
    """Gives every rank its slice of one global value a matrix."""
    plan, tp = model.distquant.plan, model.distquant.comm.axis("tp").rank
    for (module, side), parameter in adapters(model).items():
        partition, shape = partition_of(plan, module, side), list(parameter.shape)
        if partition:
            shape[partition[0]] = partition[1].size
        generator = torch.Generator().manual_seed(zlib.crc32(f"{module} {side}".encode()))
        whole = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        parts = [whole.narrow(partition[0], a, b - a) for a, b in partition[1].segments(tp)] if partition else [whole]
        parameter.data.copy_(torch.cat(parts, partition[0] if partition else 0))


def step(model: Any) -> tuple[Tensor, float, dict[tuple[str, str], Tensor]]:
    """Logits, loss and adapter gradients of one training step."""
    ids = torch.tensor(IDS)
    result = model(ids, labels=ids)
    result.loss.backward()
    return result.logits.detach(), float(result.loss.detach()), {k: p.grad for k, p in adapters(model).items()}


def train(path: str, name: str, mesh: str | None, targets: tuple[str, ...] = TARGETS) -> Any:
    model = wrap(exact(path, name, mesh), targets)
    fill(model)
    return step(model)


def train_prepared(path: str, name: str, mesh: str | None) -> Any:
    """As `train`, through PEFT's own preparation: float32 norms, gradient checkpointing, inputs that need gradients."""
    from peft import prepare_model_for_kbit_training

    options = {"use_reentrant": False}
    model = wrap(prepare_model_for_kbit_training(exact(path, name, mesh), gradient_checkpointing_kwargs=options))
    fill(model)
    model.train()
    return step(model)


def logits_after_wiring(path: str, name: str, mesh: str | None) -> Tensor:
    """Logits with adapters whose replicated half every rank drew for itself; `lora_B` is the same everywhere."""
    model = wrap(exact(path, name, mesh), ("o_proj", "down_proj"))
    for (_, side), parameter in adapters(model).items():
        if side == "lora_B":
            parameter.data.normal_(generator=torch.Generator().manual_seed(rank()))
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits


def fingerprint_after_step(path: str, name: str, mesh: str | None) -> tuple[str, str]:
    import distquant as dq

    model = exact(path, name, mesh)
    before = dq.fingerprint(model)
    peft = wrap(model)
    fill(peft)
    step(peft)
    torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], 0.1).step()
    return before, dq.fingerprint(peft)


def answer(path: str, name: str, mesh: str | None) -> list[list[int]]:
    model = wrap(exact(path, name, mesh))
    fill(model)
    return model.generate(input_ids=torch.tensor(IDS), max_new_tokens=6, do_sample=False).tolist()


def save_adapter(path: str, name: str, mesh: str | None, folder: str) -> None:
    wrap(exact(path, name, mesh)).save_pretrained(folder)
