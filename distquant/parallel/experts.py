"""The local experts of a module: one stack of components for each projection, and only hit experts are dequantized.

`LocalExperts` replaces a model's own module of fused experts and is called as that is: with tokens, the router's choice
and its weights (or, in Llama-4's form, with every token for every expert). Weights of quantized projections exist one
expert at a time, in forward and again in backward. Gradients flow to the tokens and to the router's weights, so
adapters elsewhere train. Plain projections are ordinary parameters under the model's own names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial as bind
from typing import Any

import torch
from torch import Tensor, nn

from distquant.memory import MEMORY
from distquant.model import ExpertsDescription as Form
from distquant.model.description import Projection
from distquant.options import ALL_TO_ALL
from distquant.parallel.comm import Axis, Comm, SoloAxis
from distquant.parallel.expert_stack import ExpertStack
from distquant.parallel.grouped_matmul import grouped_matmul, has_kernel
from distquant.parallel.tensor_parallel import copy_input, reduce_output
from distquant.planning.load_plan import LoadPlan
from distquant.quantization.linear.dequant_matmul import dequant_matmul
from distquant.sharding.mesh import REPLICA
from distquant.sharding.partition import Partition

STACK = "_stack"
"""Suffix of a projection's name in that of its stack: PEFT, asked to adapt all `gate_proj`, must not match it."""


class LocalExperts(nn.Module):
    """This rank's experts of one module.

    Args:
        original: the model's own module; its activation is used, its parameters are not.
        form: its projections.
        partition: of all experts over ep.
        rank: this rank's position on ep.
    """

    _is_hf_initialized = True
    axis: Axis
    """Ranks over which the results are summed: those of ep, and of tp if each expert is partitioned."""
    ep: Axis
    """Ranks with other experts."""
    tp: Axis
    """Ranks with other parts of the same experts; this rank alone where experts are complete."""
    first: int
    last: int

    def __init__(self, original: nn.Module, form: Form, partition: Partition, rank: int):
        super().__init__()
        self.form, self.partition, self.rank = form, partition, rank
        ((self.first, self.last),) = partition.segments(rank)
        self.num_experts = form.count
        # Not a child module: only its functions are used, and none of its parameters is ever filled.
        self.__dict__["original"] = original
        self.__dict__["axis"] = self.__dict__["ep"] = self.__dict__["tp"] = SoloAxis()
        self.__dict__["dispatch"] = ""
        self.plain: dict[str, tuple[str, int, int]] = {}
        """`<projection>.weight` (not quantized) or `.bias` -> the parameter here, its first and last row in that."""

    def join(self, axis: Axis, ep: Axis, tp: Axis, dispatch: str) -> None:
        """Connects to experts of other ranks; `dispatch` (of `options.DISPATCH`) is how tokens reach them."""
        self.__dict__.update(axis=axis, ep=ep, tp=tp, dispatch=dispatch)

    # -- weights ---------------------------------------------------------------------------------------------------

    def weight(self, projection: str, number: int) -> Callable[[], Tensor] | Tensor:
        """Returns a local expert's weight `[out, in]`: the tensor, or a function that dequantizes it."""
        if f"{projection}.weight" in self.plain:
            return self.plain_value(f"{projection}.weight", number)
        return bind(self.stack(projection), number)

    def stack(self, projection: str) -> ExpertStack:
        """Returns the stack of a projection that is quantized."""
        stack = self._modules[projection + STACK]
        assert isinstance(stack, ExpertStack)
        return stack

    def add_stack(self, projection: str, stack: ExpertStack) -> None:
        """Adds the stack of a projection that is quantized."""
        self.add_module(projection + STACK, stack)

    def plain_value(self, name: str, number: int) -> Tensor:
        """Returns a local expert's plain weight or bias, by `<projection>.weight` or `.bias`."""
        leaf, start, stop = self.plain[name]
        parameter = self._parameters[leaf]
        assert parameter is not None
        return parameter[number, start:stop]

    def add_plain(self, name: str, parameter: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Adds an expert's weight or bias of a local shape to a parameter, after those that are there, on `meta`."""
        old = self._parameters.get(parameter)
        start = 0 if old is None else old.shape[1]
        stacked = (self.last - self.first, start + shape[0], *shape[1:])
        self.register_parameter(parameter, nn.Parameter(torch.empty(stacked, dtype=dtype, device="meta")))
        self.plain[name] = (parameter, start, start + shape[0])

    def home(self, name: str, number: int, device: torch.device) -> Tensor:
        """Returns the memory of a local expert's plain weight or bias, flat."""
        leaf = self.plain[name][0]
        parameter = self._parameters[leaf]
        assert parameter is not None
        if parameter.is_meta:
            made = MEMORY.empty(parameter.numel(), parameter.dtype, device).view(parameter.shape)
            self._parameters[leaf] = nn.Parameter(made, requires_grad=parameter.requires_grad)
        return self.plain_value(name, number).detach().view(-1)

    @classmethod
    def around(cls, original: nn.Module, form: Form) -> LocalExperts:
        """Returns the experts of a model's own module, with its parameters; `to_original` undoes it."""
        module = cls(original, form, Partition(form.count, (((0, form.count),),)), 0)
        for projection in form.projections:
            for suffix, leaf in (("", "weight"), *((("_bias", "bias"),) if form.bias else ())):
                name = projection.parameter + suffix
                value = original._parameters[name]
                assert value is not None
                data = value.detach().transpose(1, 2) if form.transposed and value.dim() == 3 else value.detach()
                module._parameters[name] = nn.Parameter(data, requires_grad=False)
                start, stop = projection.start, projection.start + projection.out_features
                module.plain[f"{projection.name}.{leaf}"] = (name, start, stop)
        return module

    def to_original(self) -> nn.Module:
        """Returns the model's own module, with the plain parameters of all experts in its own form."""
        own: nn.Module = self.__dict__["original"]
        for name, value in self._parameters.items():
            assert value is not None
            transposed = self.form.transposed and value.dim() == 3
            data = value.detach().transpose(1, 2) if transposed else value.detach()
            own._parameters[name] = nn.Parameter(data, requires_grad=value.requires_grad)
        return own

    def _bias(self, projection: Projection, number: int) -> Tensor | None:
        """Returns a local expert's bias; on the first rank of tp only, if the projection is summed over tp."""
        if not self.form.bias or (projection.shard_dim == 1 and self.tp.rank > 0):
            return None
        return self.plain_value(f"{projection.name}.bias", number)

    def _apply_gate(self, wide: Tensor) -> Tensor:
        """Applies the activation between the projections, by the model's own module."""
        own: Any = self.__dict__["original"]
        if self.form.projections[0].name == "up_proj":
            activated: Tensor = own.act_fn(wide)
        elif hasattr(own, "_apply_gate"):
            activated = own._apply_gate(wide)
        else:
            gate, up = wide.chunk(2, dim=-1)
            activated = up * own.act_fn(gate)
        return activated

    # -- running ---------------------------------------------------------------------------------------------------

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """Returns the weighted sum of the chosen experts' outputs for each token.

        Args:
            hidden_states: `[tokens, hidden]`; in the dense form `[experts * tokens, hidden]`.
            top_k_index: int64 `[tokens, k]`, experts by their numbers in the model.
            top_k_weights: `[tokens, k]`.
        """
        if top_k_index is None or top_k_weights is None:
            return self._forward_dense(hidden_states)
        if self.dispatch == ALL_TO_ALL and self.ep.size > 1:
            return self._forward_all_to_all(hidden_states, top_k_index, top_k_weights)
        tokens, weights = copy_input(hidden_states, self.axis), copy_input(top_k_weights, self.axis)
        each = top_k_index.shape[-1]
        # A pair is one choice of one token: pair `i` is of token `i // each`.
        chosen = top_k_index.reshape(-1) - self.first
        pairs = ((chosen >= 0) & (chosen < self.last - self.first)).nonzero().view(-1)
        # Expert after expert, so that each one is dequantized once for all its tokens. Stable: sums in one order.
        order = torch.argsort(chosen[pairs], stable=True)
        pairs = pairs[order]
        counts = torch.bincount(chosen[pairs], minlength=self.last - self.first).tolist()
        outputs = self._run(tokens[pairs // each], counts)
        weighted = outputs * weights.reshape(-1)[pairs].unsqueeze(-1)
        # Sum in float32: in bfloat16 the result would depend more on how experts are spread over ranks.
        summed = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
        summed = summed.index_add(0, pairs // each, weighted.float())
        return reduce_output(summed.to(hidden_states.dtype), self.axis)

    def _forward_dense(self, hidden_states: Tensor) -> Tensor:
        """Runs Llama-4's form: every expert gets every token, and those that are not its own as rows of zeros."""
        tokens = copy_input(hidden_states, self.axis)
        rows = tokens.view(self.form.count, -1, tokens.shape[-1])[self.first : self.last].flatten(0, 1)
        # Their results stay zero, so those rows need no work, and experts that have only such rows no weight.
        hit = rows.detach().ne(0).any(-1)
        counts = hit.view(self.last - self.first, -1).sum(1).tolist()
        places = hit.nonzero().view(-1)
        outputs = self._run(rows[places], counts)
        per_expert = len(tokens) // self.form.count
        result = torch.zeros_like(hidden_states)
        result = result.index_add(0, places + self.first * per_expert, outputs.to(result.dtype))
        return reduce_output(result, self.axis)

    def _forward_all_to_all(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sends this rank's own tokens to the ranks of their experts, and takes the results back."""
        tokens, weights = copy_input(hidden_states, self.tp), copy_input(top_k_weights, self.tp)
        each, local = top_k_index.shape[-1], self.last - self.first
        chosen = top_k_index.reshape(-1)
        # Ranks hold experts in order, so choices sorted by expert are sorted by rank, too: one run for each rank.
        order = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=self.form.count)
        lengths = self.partition.lengths
        # Exchange counts first: a rank must know how many rows it gets, and of which expert each is.
        theirs = self.ep.all_to_all(counts, lengths, [local] * self.ep.size).view(self.ep.size, local)
        sent = [int(part.sum()) for part in counts.split(lengths)]
        received = theirs.sum(1).tolist()
        rows = _Exchange.apply(tokens[order // each], self.ep, sent, received)
        # Rows come rank after rank, each sorted by expert: sort them again, so that each expert is dequantized once.
        numbers = torch.arange(local, device=chosen.device).repeat(self.ep.size).repeat_interleave(theirs.view(-1))
        by_expert = torch.argsort(numbers, stable=True)
        outputs = self._run(rows[by_expert], theirs.sum(0).tolist())
        # Undo both sorts, the later one first: outputs go back in the order in which rows came.
        returned = _Exchange.apply(outputs[_inverse(by_expert)], self.ep, received, sent)
        mixed = returned[_inverse(order)].view(*top_k_weights.shape, -1).float() * weights.unsqueeze(-1).float()
        return reduce_output(mixed.sum(1).to(hidden_states.dtype), self.tp)

    def _run(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Returns outputs `[n, hidden]` of rows `[n, hidden]` that are sorted by expert, `counts` of each local one."""
        *columns, down = self.form.projections
        wide = [self._project(projection, rows, counts) for projection in columns]
        return self._project(down, self._apply_gate(torch.cat(wide, -1) if len(wide) > 1 else wide[0]), counts)

    def _project(self, projection: Projection, rows: Tensor, counts: list[int]) -> Tensor:
        """Applies one projection to rows that are sorted by expert."""
        hit = [number for number, count in enumerate(counts) if count]
        if not hit:
            # Without rows the output is empty, but it must stay in the graph: backward runs collectives on every rank.
            return rows.sum(-1, keepdim=True).expand(-1, self._width(projection))
        runs = rows.split([counts[number] for number in hit])
        weights = [self.weight(projection.name, number) for number in hit]
        # The grouped kernel takes functions that dequantize. Plain weights are there already: one product each.
        lazy = [(weight, len(run)) for weight, run in zip(weights, runs, strict=True) if callable(weight)]
        outputs: Sequence[Tensor]
        if len(lazy) == len(hit) and has_kernel(rows, (self._width(projection), rows.shape[-1])):
            outputs = grouped_matmul(rows, lazy).split([count for _, count in lazy])
        else:
            outputs = [_times(run, weight) for run, weight in zip(runs, weights, strict=True)]
        biases = [self._bias(projection, number) for number in hit]
        with_bias = (y if b is None else y + b.to(y.dtype) for y, b in zip(outputs, biases, strict=True))
        return torch.cat(list(with_bias))

    def _width(self, projection: Projection) -> int:
        if f"{projection.name}.weight" in self.plain:
            _, start, stop = self.plain[f"{projection.name}.weight"]
            return stop - start
        return self.stack(projection.name).shards[0].local_shape[0]

    def extra_repr(self) -> str:
        return f"experts={self.first} to {self.last - 1} of {self.form.count}"


def join_experts(model: nn.Module, plan: LoadPlan, comm: Comm) -> None:
    """Connects the experts of every rank with those of the others."""
    for name, shard in plan.experts.items():
        module: Any = model.get_submodule(name)
        tp = comm.axis("tp") if shard.partition is not None else SoloAxis()
        axis = comm.axis(REPLICA) if shard.partition is not None else comm.axis("ep")
        module.join(axis, comm.axis("ep"), tp, plan.dispatch)


def _inverse(order: Tensor) -> Tensor:
    """Returns the permutation that undoes `order`."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


def _times(rows: Tensor, weight: Callable[[], Tensor] | Tensor) -> Tensor:
    """Returns `rows @ weight.T` for a plain weight, or for one that is dequantized first."""
    return dequant_matmul(rows, weight) if callable(weight) else nn.functional.linear(rows, weight.to(rows.dtype))


class _Exchange(torch.autograd.Function):
    """Sends rows to other ranks and receives theirs; gradients go back the way they came."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, axis: Axis, sent: list[int], received: list[int]) -> Tensor:
        ctx.axis, ctx.sent, ctx.received = axis, sent, received
        return axis.all_to_all(rows.contiguous(), sent, received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.axis.all_to_all(grad.contiguous(), ctx.received, ctx.sent), None, None, None
