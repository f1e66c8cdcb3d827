"""Keeps a sharded model from being wrapped as if its ranks were replicas.

Data-parallel wrappers copy rank 0's weights over those of the other ranks, average gradients over all of them, and
split data over them. On a model whose ranks hold different parts that is silently another model. So a sharded model
carries what the wrappers themselves look for, on the model and on every module that differs between ranks:

- FSDP1, FSDP2 and `replicate` look up every module's registry of composable APIs;
- DeepSpeed calls `set_deepspeed_parallelism` of every module that has one, before it broadcasts.

`DistributedDataParallel` and `accelerate.Accelerator` look for nothing that a part of a model could carry: DDP asks the
outermost module alone, and neither shows the process group. They are patched, with one look before the original, when
the first sharded model is completed.
"""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn

from distquant.errors import InputError
from distquant.planning.load_plan import LoadPlan
from distquant.planning.tensor_parallel import GRAD_REDUCE
from distquant.sharding.mesh import Mesh

MARK = "_distquant_sharded"


@dataclass(frozen=True)
class Sharded:
    """The mark of a module that differs between ranks."""

    mesh: Mesh
    rank: int

    def refuse(self, wrapper: str) -> NoReturn:
        """Raises `InputError` with what `wrapper` would do, and what works."""
        what = f"the model is sharded ({self.mesh}): its ranks hold different parts, and would be treated as replicas"
        fix = "Train it unwrapped, the same batch on every rank of a replica, or load it with tp=1 and ep=1"
        if wrapper == DDP and self.mesh.dp > 1:
            fix = f"Give it a process_group of replicas alone (here ranks {list(self.mesh.peers(self.rank, 'dp'))})"
        raise InputError.one(wrapper, what, fix)

    def are_replicas(self, ranks: Iterable[int]) -> bool:
        """Tells if all of these ranks hold the same parts as this one."""
        return set(ranks) <= set(self.mesh.peers(self.rank, "dp"))


@dataclass(frozen=True)
class _RefuseDeepSpeed:
    sharded: Sharded

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        self.sharded.refuse("deepspeed.initialize")


class _Registry(OrderedDict[str, Any]):
    """A module's registry of composable APIs: none may be added, and no wrapper of its parents may take it along."""

    def __init__(self, sharded: Sharded):
        super().__init__()
        self.sharded = sharded

    def __contains__(self, api: object) -> bool:
        self.sharded.refuse("FSDP")

    def __deepcopy__(self, memo: dict[int, Any]) -> _Registry:
        return _Registry(self.sharded)

    def __reduce__(self) -> tuple[type, tuple[Sharded]]:
        return _Registry, (self.sharded,)


def refuse_wrappers(model: nn.Module, plan: LoadPlan, rank: int) -> None:
    """Marks a sharded model and its parts, and patches what marks cannot reach."""
    from torch.distributed._composable.contract import REGISTRY_KEY

    sharded = Sharded(plan.mesh, rank)
    parts = [name for name, shard in plan.modules.items() if shard.style != GRAD_REDUCE]
    for name in ("", *parts, *plan.experts):
        marks = model.get_submodule(name).__dict__
        marks[MARK], marks[REGISTRY_KEY] = sharded, _Registry(sharded)
        marks["set_deepspeed_parallelism"] = _RefuseDeepSpeed(sharded)
    _patch()


def _sharded(module: Any) -> Sharded | None:
    """The mark of a module, or of the first part of it that has one."""
    parts = module.modules() if isinstance(module, nn.Module) else ()
    return next((part.__dict__[MARK] for part in parts if MARK in part.__dict__), None)


# -- patches -----------------------------------------------------------------------------------------------------------

DDP, ACCELERATOR = "DistributedDataParallel", "Accelerator.prepare"


def _patch() -> None:
    from accelerate import Accelerator
    from torch.nn.parallel import DistributedDataParallel

    _look_before(DistributedDataParallel, "__init__", _look_at_ddp)
    _look_before(Accelerator, "prepare_model", _look_at_accelerator)


def _look_before(cls: Any, method: str, look: Callable[[dict[str, Any]], None]) -> None:
    """Makes a method call `look` with its arguments first; once, however often it is asked for."""
    original = getattr(cls, method)
    if hasattr(original, MARK):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def looked(*args: Any, **kwargs: Any) -> Any:
        look(signature.bind(*args, **kwargs).arguments)
        return original(*args, **kwargs)

    setattr(looked, MARK, True)
    setattr(cls, method, looked)


def _look_at_ddp(given: dict[str, Any]) -> None:
    import torch.distributed as dist

    sharded = _sharded(given["module"])
    if sharded is None:
        return
    mesh, group = given.get("device_mesh"), given.get("process_group")
    if mesh is not None and mesh.ndim == 1:
        group = mesh.get_group()
    if not sharded.are_replicas(dist.get_process_group_ranks(group)):
        sharded.refuse(DDP)


def _look_at_accelerator(given: dict[str, Any]) -> None:
    """Where accelerate knows of no other ranks, it wraps nothing, and gives each all of the data."""
    sharded = _sharded(given["model"])
    if sharded is not None and given["self"].num_processes > 1:
        sharded.refuse(ACCELERATOR)
