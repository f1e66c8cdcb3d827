"""What ranks do when a mixture of experts answers and learns."""

from __future__ import annotations

from typing import Any

import lora
import torch
import work
from peft import prepare_model_for_kbit_training

import distquant as dq

BATCHES = (work.IDS, ((64, 23, 7, 80, 9, 118, 4),), ((12,), (55,), (101,)))
"""Of every ep rank its own: other prompts, of another shape."""
ATTENTION = ("q_proj", "v_proj", "o_proj")


def own_batch(path: str, quant: Any, mesh: str | None, number: int | None, kwargs: dict[str, Any]) -> Any:
    """Logits of a batch, and gradients of its embeddings; number None: that of this rank's place on ep."""
    model = dq.load(path, quantization_config=quant, mesh=mesh, dtype="float32", **kwargs)
    ids = torch.tensor(BATCHES[model.distquant.comm.axis("ep").rank if number is None else number])
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    logits.square().sum().backward()
    return logits.detach(), embedded.grad


def train(path: str, quant: Any, mesh: str | None = None, checkpointing: bool = False, steps: int = 3) -> Any:
    """LoRA on attention: logits and adapter gradients of the first step, and the loss of every step.

    With `checkpointing` through PEFT's own preparation: layers run once more in backward.
    """
    model = dq.load(path, quantization_config=quant, mesh=mesh, dtype="float32")
    if checkpointing:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = lora.wrap(model, ATTENTION)
    lora.fill(model)
    model.train(checkpointing)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    logits, loss, gradients = lora.step(model)
    first = {name: gradient.clone() for name, gradient in gradients.items()}
    losses = [loss]
    for _ in range(steps):
        optimizer.step()
        optimizer.zero_grad()
        losses.append(lora.step(model)[1])
    return logits, losses, first


def tokens(jobs: list[tuple[str, Any]], mesh: str | None = None) -> list[list[list[int]]]:
    """Greedy answers."""
    return [work.tokens(path, name, mesh, do_sample=False) for path, name in jobs]




def fingerprints_of_step(path: str, quant: Any, mesh: str | None = None) -> tuple[str, str]:
    """Before and after a step of adapters on attention."""
    model = dq.load(path, quantization_config=quant, mesh=mesh, dtype="float32")
    before = dq.fingerprint(model)
    adapted = lora.wrap(model, ATTENTION)
    lora.fill(adapted)
    lora.step(adapted)
    torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.1).step()
    return before, dq.fingerprint(adapted)
