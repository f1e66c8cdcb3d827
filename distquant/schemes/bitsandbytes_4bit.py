"""bitsandbytes NF4 and FP4, with and without double quantization, exact at every width.

Codes: two a byte, the even element in the high nibble, row-major; absmax per 64 elements of the flattened weight, which
straddle rows where a row is no multiple of 64. Double quantization subtracts the mean of all absmax and stores them as
8-bit codes with one float32 per 256 (bitsandbytes `functional.quantize_4bit`). Neither mean nor second-level blocks are
local to a shard, so every rank gets all absmax (1/64 of the elements) and quantizes the whole, on one thread: `mean`
over one and over two threads differ in the last bit. A shard keeps the nested form where its blocks are whole runs of
256, and otherwise stores the same values as float32 absmax.

Along `in` a shard may need blocks of 32 where 64 would straddle its rows: absmax are then repeated, which changes no
value. Rows are quantized whole before they are cut, so a cut may pass through a block of 64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from distquant.config import Bnb4bitConfig, torch_dtype
from distquant.errors import InputError, Problem
from distquant.kernels import reference
from distquant.layout import DTYPE_BYTES, Component, Layout
from distquant.schemes.absmax import (
    BLOCK,
    FINE_BLOCK,
    SECOND,
    Statistics,
    cut_crosses_blocks,
    keeps_nesting,
    local_block,
    local_statistics,
    quantize_absmax,
)
from distquant.schemes.bitsandbytes import BitsandbytesScheme
from distquant.schemes.registry import register
from distquant.schemes.shard import Shard

if TYPE_CHECKING:
    from distquant.tally import Tally


@register
class Bnb4bitScheme(BitsandbytesScheme):
    """`bnb.nn.Linear4bit` of local size."""

    name = "bitsandbytes_4bit"
    config_class = Bnb4bitConfig
    suffixes: ClassVar[Mapping[str, str]] = {
        "weight.absmax": "absmax",
        "weight.quant_map": "quant_map",
        "weight.nested_absmax": "nested_absmax",
        "weight.nested_quant_map": "nested_quant_map",
        "weight.quant_state.bitsandbytes__nf4": "quant_state",
        "weight.quant_state.bitsandbytes__fp4": "quant_state",
    }
    mark = "is_loaded_in_4bit"
    config: Bnb4bitConfig

    def layout(self, name: str, shape: tuple[int, ...], dtype: str) -> Layout:
        word = DTYPE_BYTES[self.config.bnb_4bit_quant_storage]
        codes = Component(name="", dtype=self.config.bnb_4bit_quant_storage, flat=2 * word)
        cuts = (BLOCK, FINE_BLOCK)
        if not self.config.bnb_4bit_use_double_quant:
            return Layout((codes, Component(name="absmax", dtype="float32", flat=BLOCK, cuts=cuts)))
        return Layout(
            (
                codes,
                Component(name="absmax", dtype="uint8", flat=BLOCK, cuts=cuts),
                Component(name="nested_absmax", dtype="float32", flat=BLOCK * SECOND, gathered=True),
            )
        )

    def shard_nbytes(self, shard: Shard) -> int:
        count = math.prod(shard.local_shape)
        blocks = -(-count // local_block(shard))
        nested = self.config.bnb_4bit_use_double_quant and keeps_nesting(shard)
        return -(-count // 2) + (blocks + 4 * -(-blocks // SECOND) if nested else 4 * blocks)

    def flowing(self, name: str, shape: tuple[int, int], dtype: str) -> tuple[Component, ...]:
        """Codes by the byte, and the absmax that a second level is made from at the end."""
        return (
            Component(name="", dtype="uint8", flat=2),
            Component(name="absmax", dtype="float32", flat=BLOCK),
        )

    def statistics(self, shard: Shard) -> frozenset[str]:
        """absmax: all of them for a second level, and where a cut along `in` is finer than the blocks."""
        if self.config.bnb_4bit_use_double_quant or cut_crosses_blocks(shard):
            return frozenset(("absmax",))
        return frozenset()

    def check_weight(self, name: str, shape: tuple[int, ...]) -> list[Problem]:
        word = 2 * DTYPE_BYTES[self.config.bnb_4bit_quant_storage]
        if math.prod(shape) % word == 0:
            return []
        what = f"{math.prod(shape)} weights do not fill whole words of {word} ({self.config.bnb_4bit_quant_storage})"
        return [Problem(name, what, "Use bnb_4bit_quant_storage='uint8', or skip the module")]

    def check_stored(self, name: str, shape: tuple[int, ...], stored: dict[str, tuple[int, ...]]) -> list[Problem]:
        nested = self.config.bnb_4bit_use_double_quant
        needed = ["", "absmax", "quant_map", "quant_state"] + ["nested_absmax", "nested_quant_map"] * nested
        missing = [component or "weight" for component in needed if component not in stored]
        if missing:
            what = f"the checkpoint lacks {', '.join(missing)} of this quantized weight"
            return [Problem(name, what, "Download the checkpoint again, or quantize the original")]
        blocks = -(-math.prod(shape) // BLOCK)
        if math.prod(stored["absmax"]) != blocks:
            found = math.prod(stored["absmax"])
            what = f"{found} absmax for a weight of shape {list(shape)}, blocks of {BLOCK} give {blocks}"
            return [Problem(name, what, f"Only blocks of {BLOCK} are supported; quantize the original again")]
        return []

    # -- executing -------------------------------------------------------------------------------------------------

    def module(self, linear: nn.Module, shard: Shard) -> nn.Module:
        import bitsandbytes as bnb

        from distquant.schemes.straddling import StraddlingLinear4bit

        out_features, in_features = shard.local_shape
        kind = StraddlingLinear4bit if in_features % local_block(shard) else bnb.nn.Linear4bit
        module = kind(
            in_features,
            out_features,
            bias=linear.bias is not None,
            compute_dtype=torch_dtype(self.config.bnb_4bit_compute_dtype),
            compress_statistics=self.config.bnb_4bit_use_double_quant,
            quant_type=self.config.bnb_4bit_quant_type,
            quant_storage=torch_dtype(self.config.bnb_4bit_quant_storage),
            device="meta",
        )
        # The first CPU forward would repack the weights in place, drop nesting and round absmax to bfloat16.
        module.support_avx512bf16_for_cpu = False
        return module

    def encode(self, name: str, rows: Tensor, out: dict[str, Tensor], ops: Any) -> None:
        ops.quantize_4bit(rows, BLOCK, self.config.bnb_4bit_quant_type, codes=out[""], absmax=out["absmax"])

    def complete(self, shard: Shard, module: nn.Module, parts: dict[str, Tensor], ops: Any) -> None:
        absmax = parts["absmax"]
        if self.config.bnb_4bit_use_double_quant:
            statistics = quantize_absmax(absmax, shard, ops)
        else:
            statistics = Statistics(absmax)
            if self.statistics(shard):
                statistics = local_statistics(statistics, shard, ops)
        self.fill(shard, module, parts[""], statistics, torch_dtype(shard.dtype))

    def restore(self, shard: Shard, module: nn.Module, parts: dict[str, Tensor], whole: frozenset[str]) -> None:
        state = json.loads(bytes(parts["quant_state"].tolist()))
        self._check_state(shard, state)
        codes, columns = parts[""].view(torch.uint8), shard.shape[1]
        if "" in whole and shard.dim == 0:
            codes = torch.cat([codes[a * columns // 2 : -(-b * columns // 2)] for a, b in shard.rows])
        statistics = Statistics(parts["absmax"].float())
        if "nested_offset" in state:
            offset = torch.tensor(float(state["nested_offset"]), device=codes.device)
            statistics = Statistics(
                None, parts["absmax"], parts["nested_absmax"], parts["nested_quant_map"].clone(), offset
            )
        if "absmax" in whole:
            statistics = local_statistics(statistics, shard)
        self.fill(shard, module, codes, statistics, getattr(torch, state["dtype"]))

    def _check_state(self, shard: Shard, state: dict[str, Any]) -> None:
        expected = {
            "quant_type": self.config.bnb_4bit_quant_type,
            "blocksize": BLOCK,
            "shape": list(shard.shape),
        }
        for key, value in expected.items():
            found = list(state[key]) if key == "shape" else state.get(key)
            if found != value:
                what = f"its quant_state says {key}={found!r}, expected {value!r}"
                raise InputError.one(shard.name, what, "The checkpoint contradicts its config; quantize it again")

    def fill(self, shard: Shard, module: Any, codes: Tensor, statistics: Statistics, dtype: torch.dtype) -> None:
        """Puts codes (uint8, flat) and statistics into a `Linear4bit`."""
        from bitsandbytes.functional import QuantState
        from bitsandbytes.nn import Params4bit

        device, quant_type = codes.device, self.config.bnb_4bit_quant_type
        state = QuantState(
            absmax=statistics.absmax if statistics.codes is None else statistics.codes,
            shape=torch.Size(shard.local_shape),
            code=reference.code_values(quant_type, device).clone(),  # saving refuses shared tensors
            blocksize=local_block(shard),
            quant_type=quant_type,
            dtype=dtype,
        )
        if statistics.codes is not None:
            state.offset, state.nested = statistics.offset, True
            state.state2 = QuantState(
                absmax=statistics.second, code=statistics.values, blocksize=SECOND, dtype=torch.float32
            )
        state.to(device)
        storage = torch_dtype(self.config.bnb_4bit_quant_storage)
        module.weight = Params4bit(
            codes.view(storage).view(-1, 1),
            requires_grad=False,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=quant_type,
            quant_storage=storage,
            module=module,
            bnb_quantized=True,
        )
        module.quant_state = state

    def dequantized(self, module: nn.Module, shard: Shard, ops: Any) -> Tensor:
        from distquant.schemes.straddling import dequantized

        return dequantized(module).to(torch_dtype(shard.dtype))

    def tally(self, module: nn.Module, shard: Shard, tally: Tally) -> None:
        weight: Any = module.weight
        state = weight.quant_state
        rows, columns = shard.local_shape
        codes = reference.unpack_4bit(weight.data.contiguous().view(torch.uint8).view(-1))
        codes = codes[: rows * columns].view(rows, columns)
        second = state.state2
        statistics = Statistics(state.absmax.float())
        if state.nested:
            statistics = Statistics(None, state.absmax, second.absmax, second.code, state.offset)
        absmax, block = statistics.effective(), state.blocksize
        if columns % block:
            absmax, block = absmax.repeat_interleave(block)[: rows * columns], 1
        absmax = absmax.view(rows, columns // block)
        tally.shard("code", codes, shard.shape, shard.dim, shard.owned)
        tally.shard("scale", absmax, shard.shape, shard.dim, shard.owned, span=block)
