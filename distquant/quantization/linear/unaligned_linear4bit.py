"""The one module that bitsandbytes lacks: a `Linear4bit` whose rows are not a multiple of its block."""

from __future__ import annotations

from functools import partial
from typing import Any

from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from distquant.quantization.algorithms.nested_absmax import Statistics
from distquant.quantization.linear.dequant_matmul import dequant_matmul, ops_on
from distquant.quantization.linear.linear4bit_components import components_of


def dequantized(module: nn.Module) -> Tensor:
    """The weight of a `Linear4bit` by the flat definition, `[out, in]`, in the dtype that it was quantized from."""
    weight: Any = module.weight
    ops, state, components = ops_on(weight.device), weight.quant_state, components_of(module)
    absmax = Statistics.of(components).effective(ops)
    return ops.dequantize_4bit(
        components[""], absmax, state.blocksize, state.quant_type, tuple(state.shape), dtype=state.dtype
    )


class UnalignedLinear4bit(Linear4bit):
    """A `Linear4bit` whose rows are not a multiple of the block, where upstream's CPU kernel reads the wrong absmax."""

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.to(self.compute_dtype) if self.compute_dtype is not None else x
        output = dequant_matmul(inputs, partial(dequantized, self))
        if self.bias is not None:
            output = output + self.bias.to(output.dtype)
        return output.to(x.dtype)
