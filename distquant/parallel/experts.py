"""The local experts of a module: one stack of stored components for each projection, and only hit experts dequantized.

`Experts` takes the place of a model's own module of fused experts and is called as that is: with tokens, the router's
choice and its weights (or, in Llama-4's form, with every token for every expert). Weights of quantized projections
exist one expert at a time, in forward and again in backward; gradients flow to the tokens and to the router's weights,
so adapters elsewhere train. Plain projections are ordinary parameters under the model's own names.
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
from distquant.parallel.comm import Axis, Comm, SoloAxis
from distquant.parallel.expert_stack import ExpertStack
from distquant.parallel.grouped_matmul import grouped_product, has_kernel
from distquant.parallel.tensor_parallel import copy_input, reduce_output
from distquant.planning.expert_parallel import ALL_TO_ALL
from distquant.planning.load_plan import LoadPlan
from distquant.quantization.linear.dequant_matmul import dequant_matmul
from distquant.sharding.mesh import REPLICA
from distquant.sharding.partition import Partition

STACK = "_stack"
"""What follows a projection's name in that of its stack: PEFT, told to adapt all `gate_proj`, must not find it."""


class Experts(nn.Module):
    """This rank's experts of one module.

    Args:
        original: the model's own module; its activation is used, its parameters are not.
        form: what projections it has.
        dealt: cut of all experts over ep.
        rank: this rank's position on ep.
    """

    _is_hf_initialized = True
    axis: Axis
    """Ranks among which the results are summed: over ep, and over tp if experts are cut inside."""
    ep: Axis
    """Ranks with other experts."""
    tp: Axis
    """Ranks with other parts of the same experts; of one rank where they are whole."""
    first: int
    last: int

    def __init__(self, original: nn.Module, form: Form, dealt: Partition, rank: int):
        super().__init__()
        self.form, self.dealt, self.rank = form, dealt, rank
        ((self.first, self.last),) = dealt.segments(rank)
        self.num_experts = form.count
        # Not a child: what it is asked for are functions, and none of its parameters is filled.
        self.__dict__["original"] = original
        self.__dict__["axis"] = self.__dict__["ep"] = self.__dict__["tp"] = SoloAxis()
        self.__dict__["dispatch"] = ""
        self.plain: dict[str, tuple[str, int, int]] = {}
        """`<projection>.weight` (not quantized) or `.bias` -> the parameter here, its first and last row in that."""

    def join(self, axis: Axis, ep: Axis, tp: Axis, dispatch: str) -> None:
        """Makes experts of other ranks known; `dispatch` is how tokens reach them (`planning.experts.DISPATCH`)."""
        self.__dict__.update(axis=axis, ep=ep, tp=tp, dispatch=dispatch)

    # -- weights ---------------------------------------------------------------------------------------------------

    def weight(self, projection: str, number: int) -> Callable[[], Tensor] | Tensor:
        """A local expert's weight `[out, in]`: the tensor, or what dequantizes it."""
        if f"{projection}.weight" in self.plain:
            return self.plain_value(f"{projection}.weight", number)
        return bind(self.stack(projection), number)

    def stack(self, projection: str) -> ExpertStack:
        """The stack of a projection that is quantized."""
        found = self._modules[projection + STACK]
        assert isinstance(found, ExpertStack)
        return found

    def add_stack(self, projection: str, stack: ExpertStack) -> None:
        """Adds the stack of a projection that is quantized."""
        self.add_module(projection + STACK, stack)

    def plain_value(self, name: str, number: int) -> Tensor:
        """A local expert's plain weight or bias, by `<projection>.weight` or `.bias`."""
        parameter, start, stop = self.plain[name]
        found = self._parameters[parameter]
        assert found is not None
        return found[number, start:stop]

    def add_plain(self, name: str, parameter: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Adds an expert's weight or bias of a local shape to a parameter, after those that are there, on `meta`."""
        old = self._parameters.get(parameter)
        start = 0 if old is None else old.shape[1]
        whole = (self.last - self.first, start + shape[0], *shape[1:])
        self.register_parameter(parameter, nn.Parameter(torch.empty(whole, dtype=dtype, device="meta")))
        self.plain[name] = (parameter, start, start + shape[0])

    def home(self, name: str, number: int, device: torch.device) -> Tensor:
        """Memory of a local expert's plain weight or bias, flat."""
        parameter = self.plain[name][0]
        found = self._parameters[parameter]
        assert found is not None
        if found.is_meta:
            made = MEMORY.empty(found.numel(), found.dtype, device).view(found.shape)
            self._parameters[parameter] = nn.Parameter(made, requires_grad=found.requires_grad)
        return self.plain_value(name, number).detach().view(-1)

    @classmethod
    def around(cls, original: nn.Module, form: Form) -> Experts:
        """The experts of a model's own module, with its parameters; what `to_original` undoes."""
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
        """The model's own module, with the plain parameters of all experts in the form that it has them in."""
        own: nn.Module = self.__dict__["original"]
        for name, value in self._parameters.items():
            assert value is not None
            transposed = self.form.transposed and value.dim() == 3
            data = value.detach().transpose(1, 2) if transposed else value.detach()
            own._parameters[name] = nn.Parameter(data, requires_grad=value.requires_grad)
        return own

    def _bias(self, projection: Projection, number: int) -> Tensor | None:
        """A local expert's bias; of a projection that is summed over tp, on the first of its ranks only."""
        if not self.form.bias or (projection.shard_dim == 1 and self.tp.rank > 0):
            return None
        return self.plain_value(f"{projection.name}.bias", number)

    def _apply_gate(self, wide: Tensor) -> Tensor:
        """The activation between the projections, by the model's own module."""
        own: Any = self.__dict__["original"]
        if self.form.projections[0].name == "up_proj":
            found: Tensor = own.act_fn(wide)
        elif hasattr(own, "_apply_gate"):
            found = own._apply_gate(wide)
        else:
            gate, up = wide.chunk(2, dim=-1)
            found = up * own.act_fn(gate)
        return found

    # -- running ---------------------------------------------------------------------------------------------------

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """The weighted sum of the chosen experts' outputs for each token.

        Args:
            hidden_states: `[tokens, hidden]`; in the dense form `[experts * tokens, hidden]`.
            top_k_index: int64 `[tokens, k]`, experts by their numbers in the model.
            top_k_weights: `[tokens, k]`.
        """
        if top_k_index is None or top_k_weights is None:
            return self._dense(hidden_states)
        if self.dispatch == ALL_TO_ALL and self.ep.size > 1:
            return self._sent(hidden_states, top_k_index, top_k_weights)
        tokens, weights = copy_input(hidden_states, self.axis), copy_input(top_k_weights, self.axis)
        each = top_k_index.shape[-1]
        chosen = top_k_index.reshape(-1) - self.first
        pairs = ((chosen >= 0) & (chosen < self.last - self.first)).nonzero().view(-1)
        order = torch.argsort(chosen[pairs], stable=True)
        pairs = pairs[order]
        counts = torch.bincount(chosen[pairs], minlength=self.last - self.first).tolist()
        outputs = self._run(tokens[pairs // each], counts)
        weighted = outputs * weights.reshape(-1)[pairs].unsqueeze(-1)
        summed = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
        summed = summed.index_add(0, pairs // each, weighted.float())
        return reduce_output(summed.to(hidden_states.dtype), self.axis)

    def _dense(self, hidden_states: Tensor) -> Tensor:
        """Llama-4's form: rows of zeros are tokens that the router did not send there, and stay so."""
        tokens = copy_input(hidden_states, self.axis)
        rows = tokens.view(self.form.count, -1, tokens.shape[-1])[self.first : self.last].flatten(0, 1)
        hit = rows.detach().ne(0).any(-1)
        counts = hit.view(self.last - self.first, -1).sum(1).tolist()
        places = hit.nonzero().view(-1)
        outputs = self._run(rows[places], counts)
        per_expert = len(tokens) // self.form.count
        result = torch.zeros_like(hidden_states)
        result = result.index_add(0, places + self.first * per_expert, outputs.to(result.dtype))
        return reduce_output(result, self.axis)

    def _sent(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Every rank of ep has tokens of its own: sends them to their experts' ranks, and takes the results back."""
        tokens, weights = copy_input(hidden_states, self.tp), copy_input(top_k_weights, self.tp)
        each, local = top_k_index.shape[-1], self.last - self.first
        chosen = top_k_index.reshape(-1)
        order = torch.argsort(chosen, stable=True)  # by expert, and so by rank
        counts = torch.bincount(chosen, minlength=self.form.count)
        held = self.dealt.lengths
        theirs = self.ep.all_to_all(counts, held, [local] * self.ep.size).view(self.ep.size, local)
        sent = [int(part.sum()) for part in counts.split(held)]
        got = theirs.sum(1).tolist()
        received = _Exchange.apply(tokens[order // each], self.ep, sent, got)
        numbers = torch.arange(local, device=chosen.device).repeat(self.ep.size).repeat_interleave(theirs.view(-1))
        by_expert = torch.argsort(numbers, stable=True)
        outputs = self._run(received[by_expert], theirs.sum(0).tolist())
        back = torch.empty_like(by_expert)
        back[by_expert] = torch.arange(len(by_expert), device=back.device)
        returned = _Exchange.apply(outputs[back], self.ep, got, sent)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        mixed = returned[place].view(*top_k_weights.shape, -1).float() * weights.unsqueeze(-1).float()
        return reduce_output(mixed.sum(1).to(hidden_states.dtype), self.tp)

    def _run(self, rows: Tensor, counts: list[int]) -> Tensor:
        """`[n, hidden]` outputs of rows `[n, hidden]` that lie expert after expert, `counts` of each local one."""
        *columns, down = self.form.projections
        wide = [self._project(projection, rows, counts) for projection in columns]
        return self._project(down, self._apply_gate(torch.cat(wide, -1) if len(wide) > 1 else wide[0]), counts)

    def _project(self, projection: Projection, rows: Tensor, counts: list[int]) -> Tensor:
        """One projection of rows, expert after expert; without any, still a part of the graph."""
        hit = [number for number, count in enumerate(counts) if count]
        if not hit:
            return rows.sum(-1, keepdim=True).expand(-1, self._width(projection))
        runs = rows.split([counts[number] for number in hit])
        weights = [self.weight(projection.name, number) for number in hit]
        lazy = [(weight, len(run)) for weight, run in zip(weights, runs, strict=True) if callable(weight)]
        outputs: Sequence[Tensor]
        if len(lazy) == len(hit) and has_kernel(rows, (self._width(projection), rows.shape[-1])):
            outputs = grouped_product(rows, lazy).split([count for _, count in lazy])
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
    """Makes the experts of every rank known to the modules of the others; where all are here, to themselves."""
    for name, shard in plan.experts.items():
        module: Any = model.get_submodule(name)
        tp = comm.axis("tp") if shard.partition is not None else SoloAxis()
        axis = comm.axis(REPLICA) if shard.partition is not None else comm.axis("ep")
        module.join(axis, comm.axis("ep"), tp, plan.dispatch)


def _times(rows: Tensor, weight: Callable[[], Tensor] | Tensor) -> Tensor:
    """`rows @ weight.T`, of a plain weight or of one that is dequantized for it."""
    return dequant_matmul(rows, weight) if callable(weight) else nn.functional.linear(rows, weight.to(rows.dtype))


class _Exchange(torch.autograd.Function):
    """Rows to other ranks and from them; gradients go back the way they came."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, axis: Axis, sent: list[int], got: list[int]) -> Tensor:
        ctx.axis, ctx.sent, ctx.got = axis, sent, got
        return axis.all_to_all(rows.contiguous(), sent, got)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.axis.all_to_all(grad.contiguous(), ctx.got, ctx.sent), None, None, None
