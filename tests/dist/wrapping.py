"""Wrappers for data parallel training, each put around a model on one rank."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lora import TARGETS, step, wrap
from torch import nn
from work import IDS, exact, rank

import distquant as dq

Wrap = Callable[[Any], Any]


def as_launched() -> None:
    """Sets what torchrun would: accelerate and DeepSpeed look at the environment, not at the group."""
    here = {"RANK": rank(), "LOCAL_RANK": rank(), "WORLD_SIZE": dist.get_world_size(), "LOCAL_WORLD_SIZE": 1}
    os.environ.update({name: str(value) for name, value in here.items()})
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500", ACCELERATE_USE_CPU="true", DS_ACCELERATOR="cpu")


def as_alone() -> None:
    """Takes back what `as_launched` set."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


class Policy(nn.Module):
    """A module of the user's, with a model in it."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids).logits


def ddp(model: Any) -> Any:
    return nn.parallel.DistributedDataParallel(model)


def ddp_around_a_wrapper(model: Any) -> Any:
    return nn.parallel.DistributedDataParallel(Policy(model))


def ddp_of_a_layer(model: Any) -> Any:
    return nn.parallel.DistributedDataParallel(layers(model)[0])


def ddp_on_a_mesh(model: Any) -> Any:
    return nn.parallel.DistributedDataParallel(model, device_mesh=cpu_mesh())


def fsdp1(model: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def cpu_mesh() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),))


def fsdp2(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=cpu_mesh())


def fsdp2_around_a_wrapper(model: Any) -> Any:
    return fsdp2(Policy(model))


def fsdp2_of_a_layer(model: Any) -> Any:
    return fsdp2(layers(model)[0])


def composable_replicate(model: Any) -> Any:
    from torch.distributed._composable.replicate_with_fsdp import replicate

    return replicate(model, mesh=cpu_mesh())


def accelerate(model: Any) -> Any:
    from accelerate import Accelerator

    return Accelerator().prepare(model)


def accelerate_frozen(model: Any) -> Any:
    """Nothing is wrapped, but data would be split over the ranks."""
    return accelerate(model.requires_grad_(False))


def accelerate_fsdp2(model: Any) -> Any:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    trained = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    return Accelerator(fsdp_plugin=plugin, cpu=True).prepare(model, trained)


def trainer(model: Any) -> Any:
    return trained(model, 1)


def evaluation(model: Any) -> Any:
    return _trainer(model, 1).evaluate()


def deepspeed_zero(model: Any) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    return deepspeed.initialize(model=model, config=config)[0]


def layers(model: Any) -> Any:
    return next(module for name, module in model.named_modules() if name.endswith("model.layers"))


class Data(torch.utils.data.Dataset):
    """Eight sequences, the same for everyone."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(3, 110, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def _trainer(model: Any, batch: int, steps: int = 1) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        max_steps=steps,
        logging_steps=1,
        learning_rate=5e-2,
        lr_scheduler_type="constant",
        optim="sgd",
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        data_seed=0,
    )
    return Trainer(model=model, args=arguments, train_dataset=Data(), eval_dataset=Data())


def trained(model: Any, batch: int, steps: int = 1) -> list[float]:
    """Losses of transformers' Trainer."""
    made = _trainer(model, batch, steps)
    made.train()
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def refused(path: str, name: str, mesh: str, wrapper: Wrap, peft: bool) -> tuple[Any, str, str]:
    """What a wrapper raises, and fingerprints before and after."""
    model = exact(path, name, mesh)
    before, error = dq.fingerprint(model), None
    as_launched()
    try:
        wrapper(wrap(model) if peft else model)
    except Exception as raised:
        error = raised
    finally:
        as_alone()
    return error, before, dq.fingerprint(model)


def losses_of_trainer(path: str, name: str, mesh: str | None, batch: int) -> tuple[list[float], str, str]:
    """Losses over the same samples, however many ranks share them, and fingerprints before and after."""
    model = exact(path, name, mesh)
    before = dq.fingerprint(model)
    peft = wrap(model)
    fill_alike(peft)
    if mesh is not None:
        as_launched()
    try:
        return trained(peft, batch, 2), before, dq.fingerprint(model)
    finally:
        as_alone()


def fill_alike(model: Any) -> None:
    """The same adapters on every rank that holds whole weights."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.05)


def gradients_over_replicas(path: str, name: str, mesh: str) -> tuple[list[float], Any]:
    """Gradients of two steps' worth of batch: DDP over the ranks that hold the same parts, each with one prompt."""
    import lora

    model = wrap(exact(path, name, mesh), TARGETS)
    lora.fill(model)
    plan, here = model.distquant.plan, rank()
    groups = {ranks: dist.new_group(list(ranks)) for ranks in sorted({plan.mesh.peers(r, "dp") for r in range(4)})}
    mine = plan.mesh.peers(here, "dp")
    around = nn.parallel.DistributedDataParallel(model, process_group=groups[mine])
    ids = torch.tensor(IDS)[plan.mesh.coordinates(here)["dp"]].unsqueeze(0)
    around(ids, labels=ids).loss.backward()
    return dq.fingerprint(model), {key: p.grad for key, p in lora.adapters(model).items()}


def one_rank(path: str, name: str) -> Any:
    """What one rank gets for both prompts."""
    import lora

    model = wrap(exact(path, name, None), TARGETS)
    lora.fill(model)
    return dq.fingerprint(model), step(model)[2]
