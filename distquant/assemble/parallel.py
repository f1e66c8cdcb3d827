"""The parallel styles as thin communication wrappers with autograd.

They are hooks on the ecosystem's own modules, so a module keeps its exact type. `_Copy` copies forward and reduces
backward, `_Reduce` reduces forward and copies backward (Megatron-LM's f and g, arXiv 1909.08053, figure 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distquant.comm import Axis
from distquant.errors import InputError
from distquant.planning.load_plan import LoadPlan
from distquant.planning.parallel import COLWISE, COLWISE_GATHER, GRAD_REDUCE, ROWWISE, ROWWISE_SPLIT, VOCAB_EMBEDDING


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.axis.all_reduce(grad.contiguous().clone()), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return axis.all_reduce(x.contiguous().clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, sizes: list[int]) -> Tensor:
        ctx.axis, ctx.sizes = axis, sizes
        return axis.all_gather(x.contiguous(), sizes, x.dim() - 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        start = sum(ctx.sizes[: ctx.axis.rank])
        return grad.narrow(-1, start, ctx.sizes[ctx.axis.rank]).contiguous(), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, sizes: list[int]) -> Tensor:
        ctx.axis, ctx.sizes = axis, sizes
        return x.narrow(-1, sum(sizes[: axis.rank]), sizes[axis.rank]).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.axis.all_gather(grad.contiguous(), ctx.sizes, grad.dim() - 1), None, None


def copy_input(x: Tensor, axis: Axis) -> Tensor:
    """`x` as it is; its gradient is summed over the axis."""
    return x if axis.size == 1 else _Copy.apply(x, axis)


def reduce_output(x: Tensor, axis: Axis) -> Tensor:
    """`x` summed over the axis; its gradient goes back as it is."""
    return x if axis.size == 1 else _Reduce.apply(x, axis)


@dataclass(frozen=True)
class CopyInput:
    """Before a column-parallel module: its input gradient is the sum over ranks."""

    axis: Axis

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_Copy.apply(args[0], self.axis), *args[1:])


@dataclass(frozen=True)
class SplitInput:
    """Before a row-parallel module whose input is whole on every rank."""

    axis: Axis
    sizes: list[int]

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_Split.apply(args[0], self.axis, self.sizes), *args[1:])


@dataclass(frozen=True)
class GatherOutput:
    """After a column-parallel module whose output is needed whole."""

    axis: Axis
    sizes: list[int]

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return _Gather.apply(output, self.axis, self.sizes)


@dataclass(frozen=True)
class HideBias:
    """Before a row-parallel module: its bias is added once, after the sum."""

    def __call__(self, module: nn.Module, args: Any) -> None:
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
        if output is None:
            return None
        summed = _Reduce.apply(output, self.axis)
        return summed if bias is None else summed + bias.to(summed.dtype)


@dataclass(frozen=True)
class LocalIds:
    """Before a vocabulary-parallel embedding: ids of other ranks point at row 0, and are remembered."""

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
class ReduceGradient:
    """For replicated parameters inside a cut region (per-head norms): their gradient is the sum over ranks."""

    axis: Axis

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.axis.all_reduce(parameter.grad)


class _RefuseAdapterSave:
    """What PEFT asks every module for before it writes adapters: on a cut one, each rank would write its part."""

    @property
    def tp_plan(self) -> dict[str, str]:
        raise InputError.one(
            "save_pretrained",
            "the adapters sit on a sharded model, every rank would write its part as if it were the whole",
            "Gather them by hand (see model.distquant.plan.cuts), or train at tp=1 to save",
        )


def install_styles(model: nn.Module, plan: LoadPlan, axis: Axis) -> None:
    """Installs the style of every cut module."""
    for name, shard in plan.modules.items():
        module = model.get_submodule(name)
        if shard.style == GRAD_REDUCE:
            for parameter in module.parameters(recurse=False):
                parameter.register_post_accumulate_grad_hook(ReduceGradient(axis))
            continue
        cut = plan.cuts[shard.cut]
        module.__dict__["_tp_info"] = _RefuseAdapterSave()
        if shard.style in (COLWISE, COLWISE_GATHER):
            module.register_forward_pre_hook(CopyInput(axis))
            if shard.style == COLWISE_GATHER:
                module.register_forward_hook(GatherOutput(axis, cut.lengths))
        elif shard.style in (ROWWISE, ROWWISE_SPLIT):
            if shard.style == ROWWISE_SPLIT:
                module.register_forward_pre_hook(SplitInput(axis, cut.lengths))
            if module._parameters.get("bias") is not None:
                module.register_forward_pre_hook(HideBias())
            module.register_forward_hook(ReduceOutput(axis), always_call=True)
        elif shard.style == VOCAB_EMBEDDING:
            ((start, stop),) = cut.segments(axis.rank)
            module.register_forward_pre_hook(LocalIds(start, stop))
            module.register_forward_hook(SumRows(axis), always_call=True)
