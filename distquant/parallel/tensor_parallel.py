"""Parallel styles as thin communication wrappers with autograd.

They are hooks on the ecosystem's own modules, so a module keeps its exact type. `_Copy` copies forward and reduces
backward, `_Reduce` reduces forward and copies backward (Megatron-LM's f and g, arXiv 1909.08053, figure 3).
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distquant.errors import InputError
from distquant.parallel.comm import Axis
from distquant.planning.load_plan import LoadPlan
from distquant.planning.tensor_parallel import (
    COLWISE,
    COLWISE_GATHER,
    GRAD_REDUCE,
    ROWWISE,
    ROWWISE_SPLIT,
    VOCAB_EMBEDDING,
)
from distquant.sharding.partition import Partition


@functools.cache
def warn_of_norms() -> None:
    """Warns once, at the first backward, because nothing of this package is called where gradients are clipped."""
    warnings.warn(
        "each rank of a sharded model has a part of the gradients: clip_grad_norm_ would scale them by another norm on "
        "every rank, and replicated parameters would drift apart. Do not clip, or by a norm that is summed over ranks",
        stacklevel=1,
    )


class _Copy(torch.autograd.Function):
    """Copies an input that every rank has; each rank computes a part of its gradient, and the parts are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        warn_of_norms()
        # Reduce a clone: autograd may use `grad` elsewhere, and `all_reduce` changes it in place.
        return ctx.axis.all_reduce(grad.contiguous().clone()), None


class _SharedParameter(torch.autograd.Function):
    """Returns a parameter unchanged; its gradient is the sum over the ranks that hold the same elements."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, axis: Axis, partition: Partition | None) -> Tensor:
        ctx.axis = axis
        ctx.segments = partition and partition.segments(axis.rank)
        ctx.size = partition and partition.size
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.segments is None:
            return ctx.axis.all_reduce(grad.contiguous().clone()), None, None
        # Ranks hold different segments, some of them shared or repeated: only in the full dim do they line up.
        full, local = grad.new_zeros((ctx.size, *grad.shape[1:])), 0
        for start, stop in ctx.segments:
            full[start:stop] += grad[local : local + stop - start]
            local += stop - start
        ctx.axis.all_reduce(full)
        return torch.cat([full[start:stop] for start, stop in ctx.segments]), None, None


class _Reduce(torch.autograd.Function):
    """Sums the parts that ranks computed; every rank goes on with the sum, and so has its full gradient already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return axis.all_reduce(x.contiguous().clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        warn_of_norms()
        return grad, None


class _Gather(torch.autograd.Function):
    """Concatenates the ranks' features; each rank takes its own part of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, sizes: list[int]) -> Tensor:
        ctx.axis, ctx.sizes = axis, sizes
        return axis.all_gather(x.contiguous(), sizes, x.dim() - 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        start = sum(ctx.sizes[: ctx.axis.rank])
        return grad.narrow(-1, start, ctx.sizes[ctx.axis.rank]).contiguous(), None, None


class _Split(torch.autograd.Function):
    """Takes this rank's features of an input that every rank has; gradients are concatenated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, sizes: list[int]) -> Tensor:
        ctx.axis, ctx.sizes = axis, sizes
        return x.narrow(-1, sum(sizes[: axis.rank]), sizes[axis.rank]).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.axis.all_gather(grad.contiguous(), ctx.sizes, grad.dim() - 1), None, None


def copy_input(x: Tensor, axis: Axis) -> Tensor:
    """Returns `x` unchanged; its gradient is summed over the axis."""
    return x if axis.size == 1 else _Copy.apply(x, axis)


def reduce_output(x: Tensor, axis: Axis) -> Tensor:
    """Returns `x` summed over the axis; its gradient goes back unchanged."""
    return x if axis.size == 1 else _Reduce.apply(x, axis)


def gather_output(x: Tensor, axis: Axis, sizes: list[int]) -> Tensor:
    """Returns the ranks' parts of the last dim, of these sizes, side by side."""
    return x if axis.size == 1 else _Gather.apply(x, axis, sizes)


@dataclass(frozen=True)
class CopyInput:
    """Before a column-parallel module: its input gradient is the sum over ranks."""

    axis: Axis

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_Copy.apply(args[0], self.axis), *args[1:])


@dataclass(frozen=True)
class SplitInput:
    """Before a row-parallel module whose input is replicated."""

    axis: Axis
    sizes: list[int]

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_Split.apply(args[0], self.axis, self.sizes), *args[1:])


@dataclass(frozen=True)
class GatherOutput:
    """After a column-parallel module whose output is needed on every rank."""

    axis: Axis
    sizes: list[int]

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return _Gather.apply(output, self.axis, self.sizes)


@dataclass(frozen=True)
class HideBias:
    """Before a row-parallel module: its bias is added once, after the sum."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        # Through `__dict__`: an attribute set on the module would register the bias as one more parameter.
        module.__dict__["_hidden_bias"] = module._parameters["bias"]
        module._parameters["bias"] = None


@dataclass(frozen=True)
class ReduceOutput:
    """After a row-parallel module: sums over ranks, then adds the bias that `HideBias` took (also after an error)."""

    axis: Axis

    def __call__(self, module: nn.Module, args: Any, output: Tensor | None) -> Tensor | None:
        bias = module.__dict__.pop("_hidden_bias", None)
        if bias is not None:
            module._parameters["bias"] = bias
        if output is None:  # the module has failed: the hook runs all the same, to put the bias back
            return None
        summed = _Reduce.apply(output, self.axis)
        return summed if bias is None else summed + bias.to(summed.dtype)


@dataclass(frozen=True)
class LocalIds:
    """Before a vocabulary-parallel embedding: points ids of other ranks at row 0, and remembers them."""

    start: int
    stop: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        ids = args[0]
        foreign = (ids < self.start) | (ids >= self.stop)
        module.__dict__["_foreign_ids"] = foreign
        return ((ids - self.start).masked_fill(foreign, 0), *args[1:])


@dataclass(frozen=True)
class SumRows:
    """After a vocabulary-parallel embedding: drops the rows of foreign ids and sums over ranks."""

    axis: Axis

    def __call__(self, module: nn.Module, args: Any, output: Tensor | None) -> Tensor | None:
        foreign = module.__dict__.pop("_foreign_ids")
        if output is None:
            return None
        return _Reduce.apply(output.masked_fill(foreign.unsqueeze(-1), 0), self.axis)


@dataclass(frozen=True)
class SumGradients:
    """Before a module that several ranks hold: replaces its parameters by copies whose gradients are summed.

    A hook on the parameter would be lost in a copy of the module (PEFT's `modules_to_save`), and one that runs after
    accumulation would count earlier micro-batches again.
    """

    axis: Axis
    partition: Partition | None = None
    """Of the parameters' first dim, where some of its segments are held by several ranks; None = all hold all."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.is_grad_enabled():
            return
        own = {name: p for name, p in module._parameters.items() if p is not None and p.requires_grad}
        module.__dict__["_own_parameters"] = own
        for name, parameter in own.items():
            module._parameters[name] = _SharedParameter.apply(parameter, self.axis, self.partition)


@dataclass(frozen=True)
class OwnParameters:
    """After such a module (also after an error): puts its parameters back."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(module.__dict__.pop("_own_parameters", {}))


@dataclass(frozen=True)
class CheckDropout:
    """Before a dropout, on a model that trains: every rank would drop other elements of values that must be equal."""

    path: str

    def __call__(self, module: Any, args: Any) -> None:
        if module.training and module.p > 0:
            problem = f"dropout of {module.p} would drop other elements on every rank of a sharded model"
            raise InputError.one(self.path, problem, "Set it to 0 to train (LoraConfig: lora_dropout=0)")


class _RejectAdapterSave:
    """The `_tp_info` of a sharded module. PEFT asks for it before it writes adapters, of which a rank has a part."""

    @property
    def tp_plan(self) -> dict[str, str]:
        raise InputError.one(
            "save_pretrained",
            "the adapters sit on a sharded model, every rank would write its part as if it were the whole",
            "Gather them by hand (see model.distquant.plan.partitions), or train at tp=1 to save",
        )


def install_styles(model: nn.Module, plan: LoadPlan, axis: Axis) -> None:
    """Installs the style of every sharded module, and checks against training that would let copies drift apart."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_pre_hook(CheckDropout(name))
    for name, shard in plan.modules.items():
        module = model.get_submodule(name)
        if shard.style == GRAD_REDUCE:
            _sum_gradients(module, axis, None)
            continue
        partition = plan.partitions[shard.partition]
        if partition.repeated:  # kv heads: ranks that hold the same head must update it alike
            _sum_gradients(module, axis, partition)
        module.__dict__["_tp_info"] = _RejectAdapterSave()
        if shard.style in (COLWISE, COLWISE_GATHER):
            module.register_forward_pre_hook(CopyInput(axis))
            if shard.style == COLWISE_GATHER:
                module.register_forward_hook(GatherOutput(axis, partition.lengths))
        elif shard.style in (ROWWISE, ROWWISE_SPLIT):
            if shard.style == ROWWISE_SPLIT:
                module.register_forward_pre_hook(SplitInput(axis, partition.lengths))
            if module._parameters.get("bias") is not None:
                module.register_forward_pre_hook(HideBias())
            module.register_forward_hook(ReduceOutput(axis), always_call=True)
        elif shard.style == VOCAB_EMBEDDING:
            ((start, stop),) = partition.segments(axis.rank)
            module.register_forward_pre_hook(LocalIds(start, stop))
            module.register_forward_hook(SumRows(axis), always_call=True)


def _sum_gradients(module: nn.Module, axis: Axis, partition: Partition | None) -> None:
    module.register_forward_pre_hook(SumGradients(axis, partition))
    module.register_forward_hook(OwnParameters(), always_call=True)
