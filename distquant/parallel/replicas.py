"""Prevents data-parallel wrappers from treating the ranks of a sharded model as replicas.

Data-parallel wrappers copy rank 0's weights over those of the other ranks, average gradients over all of them, and
split data over them. On a model whose ranks hold different parts that is silently another model. So a sharded model
carries the marks that the wrappers themselves look for, and so does every module that differs between ranks:

- FSDP1, FSDP2 and `replicate` look up every module's registry of composable APIs;
- DeepSpeed calls `set_deepspeed_parallelism` of every module that has one, before it broadcasts.

`DistributedDataParallel` and `accelerate.Accelerator` look for nothing that a part of a model could carry: DDP asks the
outermost module alone, and neither shows the process group. Both are patched, with one check before the original, when
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

DDP, ACCELERATOR = "DistributedDataParallel", "Accelerator.prepare"


@dataclass(frozen=True)
class Sharded:
    """The mark of a module that differs between ranks."""

    mesh: Mesh
    rank: int

    def reject(self, wrapper: str) -> NoReturn:
        """Raises `InputError`: what `wrapper` would do, and an alternative that works."""
        problem = (
            f"the model is sharded ({self.mesh}): its ranks hold different parts, and would be treated as replicas"
        )
        fix = "Train it unwrapped, the same batch on every rank of a replica, or load it with tp=1 and ep=1"
        if wrapper == DDP and self.mesh.dp > 1:
            fix = f"Give it a process_group of replicas alone (here ranks {list(self.mesh.peers(self.rank, 'dp'))})"
        raise InputError.one(wrapper, problem, fix)

    def are_replicas(self, ranks: Iterable[int]) -> bool:
        """Returns True if all of these ranks hold the same parts as this one."""
        return set(ranks) <= set(self.mesh.peers(self.rank, "dp"))


@dataclass(frozen=True)
class _RejectDeepSpeed:
    sharded: Sharded

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        self.sharded.reject("deepspeed.initialize")


class _Registry(OrderedDict[str, Any]):
    """A module's registry of composable APIs that allows none, neither on the module nor on a parent around it."""

    def __init__(self, sharded: Sharded):
        super().__init__()
        self.sharded = sharded

    def __contains__(self, api: object) -> bool:
        self.sharded.reject("FSDP")

    def __deepcopy__(self, memo: dict[int, Any]) -> _Registry:
        return _Registry(self.sharded)

    def __reduce__(self) -> tuple[type, tuple[Sharded]]:
        return _Registry, (self.sharded,)


def install_wrapper_checks(model: nn.Module, plan: LoadPlan, rank: int) -> None:
    """Marks a sharded model and its parts, and patches the wrappers that look for no mark."""
    from torch.distributed._composable.contract import REGISTRY_KEY

    sharded = Sharded(plan.mesh, rank)
    parts = [name for name, shard in plan.modules.items() if shard.style != GRAD_REDUCE]
    for name in ("", *parts, *plan.experts):
        marks = model.get_submodule(name).__dict__
        marks[MARK], marks[REGISTRY_KEY] = sharded, _Registry(sharded)
        marks["set_deepspeed_parallelism"] = _RejectDeepSpeed(sharded)
    _patch()


def _sharded(module: Any) -> Sharded | None:
    """Returns the mark of a module, or of the first part of it that has one."""
    parts = module.modules() if isinstance(module, nn.Module) else ()
    return next((part.__dict__[MARK] for part in parts if MARK in part.__dict__), None)


# -- patches -----------------------------------------------------------------------------------------------------------


def _patch() -> None:
    from accelerate import Accelerator
    from torch.nn.parallel import DistributedDataParallel

    _check_before(DistributedDataParallel, "__init__", _check_ddp)
    _check_before(Accelerator, "prepare_model", _check_accelerator)


def _check_before(cls: Any, method: str, check: Callable[[dict[str, Any]], None]) -> None:
    """Makes a method call `check` with its arguments first; patches it once, however often this is called."""
    original = getattr(cls, method)
    if hasattr(original, MARK):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check(signature.bind(*args, **kwargs).arguments)
        return original(*args, **kwargs)

    setattr(checked, MARK, True)
    setattr(cls, method, checked)


def _check_ddp(arguments: dict[str, Any]) -> None:
    import torch.distributed as dist

    sharded = _sharded(arguments["module"])
    if sharded is None:
        return
    mesh, group = arguments.get("device_mesh"), arguments.get("process_group")
    if mesh is not None and mesh.ndim == 1:
        group = mesh.get_group()
    if not sharded.are_replicas(dist.get_process_group_ranks(group)):
        sharded.reject(DDP)


def _check_accelerator(arguments: dict[str, Any]) -> None:
    """Rejects a sharded model, except where accelerate knows of no other ranks: it wraps nothing there."""
    sharded = _sharded(arguments["model"])
    if sharded is not None and arguments["self"].num_processes > 1:
        sharded.reject(ACCELERATOR)
