"""Gradients of full weights and of adapters in the cases where a rank alone would get them wrong."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from lora import adapters, fill, wrap
from torch import Tensor
from work import IDS, exact, rank


def accumulated(path: str, mesh: str | None, names: str) -> dict[str, Tensor]:
    """Gradients of full weights after two micro-batches."""
    model = exact(path, "none", mesh)
    for ids in torch.tensor(IDS).split(1):
        model(ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if names in name and p.grad is not None}


def accumulated_in_a_copy(path: str, mesh: str | None) -> dict[str, Tensor]:
    """The same of head norms that PEFT copied to save them."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["o_proj"], modules_to_save=["q_norm"])
    model = get_peft_model(exact(path, "none", mesh), config)
    for ids in torch.tensor(IDS).split(1):
        model(ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if "q_norm.modules_to_save" in name}


def logits_of_a_second_adapter(path: str, mesh: str | None) -> Tensor:
    """Logits of an adapter that came under the name of one that was deleted."""
    from peft import LoraConfig

    model = wrap(exact(path, "nf4", mesh), ("q_proj", "o_proj"))
    ids, config = torch.tensor(IDS), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"])
    with torch.no_grad():
        model(ids)
        model.add_adapter("other", config)
        model.set_adapter("other")
        model.delete_adapter("default")
        model.add_adapter("default", config)
        model.set_adapter("default")
        model.delete_adapter("other")
        fill(model)
        return model(ids).logits


def start(path: str, mesh: str | None, init: Any) -> Tensor:
    """Logits with an adapter as PEFT initialized it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(rank())
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=init)
    with torch.no_grad():
        return get_peft_model(exact(path, "none", mesh), config)(torch.tensor(IDS)).logits


def with_dropout(path: str, mesh: str | None, training: bool) -> Tensor:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], lora_dropout=0.1)
    model = get_peft_model(exact(path, "nf4", mesh), config).train(training)
    fill(model)
    return model(torch.tensor(IDS)).logits.detach()


def base_dropout(path: str, mesh: str | None) -> Tensor:
    """A model with a dropout of its own, in training mode."""
    model = exact(path, "none", mesh).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return model(torch.tensor(IDS)).logits.detach()


def warnings_of_training(path: str, mesh: str | None) -> list[str]:
    """What two backward passes warn of."""
    from distquant.parallel.tensor_parallel import warn_of_norms

    model = wrap(exact(path, "nf4", mesh))
    fill(model)
    warn_of_norms.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(torch.tensor(IDS), labels=torch.tensor(IDS)).loss.backward()
    assert all(p.grad is not None for p in adapters(model).values())
    return [str(warning.message) for warning in caught if "clip_grad_norm_" in str(warning.message)]
