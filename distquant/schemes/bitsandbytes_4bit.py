"""bitsandbytes NF4 and FP4, with and without double quantization, exact at every width.

Codes: two a byte, the even element in the high nibble, row-major; absmax per 64 elements of the flattened weight, which
straddle rows where a row is no multiple of 64. Double quantization subtracts the mean of all absmax and stores them as
8-bit codes with one float32 per 256 (bitsandbytes `functional.quantize_4bit`). Neither mean nor second-level blocks are
local to a shard, so absmax (1/64 of the elements) are gathered over the axis and quantized on the whole, on one thread:
`mean` over one and over two threads differ in the last bit. A shard keeps the nested form where its blocks are whole
runs of 256, and otherwise stores the same values as float32 absmax.

Along `in` a shard may need blocks of 32 where 64 would straddle its rows: absmax are then repeated, which changes no
value. If the cut passes through a block of 64, its absmax is the maximum over the ranks that share it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from distquant import hostmem
from distquant.config import Bnb4bitConfig, torch_dtype
from distquant.errors import InputError, Problem
from distquant.kernels import reference
from distquant.layout import DTYPE_BYTES, Component, Layout
from distquant.schemes.absmax import (
    BLOCK,
    FINE_BLOCK,
    SECOND,
    Statistics,
    block_index,
    cut_crosses_blocks,
    keeps_nesting,
    local_block,
    local_statistics,
    quantize_absmax,
)
from distquant.schemes.base import Quantizer, Stored
from distquant.schemes.bitsandbytes import BitsandbytesScheme
from distquant.schemes.registry import register
from distquant.schemes.shard import Shard

if TYPE_CHECKING:
    from distquant.comm import Axis
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

    def layout(self, shape: tuple[int, ...], dtype: str) -> Layout:
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

    def row_step(self, shard: Shard) -> int:
        """Rows that are whole blocks (of the weight where ranks share some) and whole bytes of codes."""
        width, block = shard.local_shape[1], local_block(shard)
        step = block // math.gcd(block, width)
        if cut_crosses_blocks(shard):
            step = BLOCK // math.gcd(BLOCK, shard.shape[1])
        return step * 2 if step * width % 2 else step

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

    def quantizer(self, shard: Shard, module: nn.Module, axis: Axis, device: Any) -> Quantizer:
        return _Quantizer(self, shard, module, axis, device)

    def restore(self, shard: Shard, module: nn.Module, stored: Stored, device: Any) -> None:
        state = json.loads(bytes(stored.read("quant_state").tolist()))
        self._check_state(shard, state)
        columns = shard.shape[1]
        if shard.dim == 1:
            ((a, b),) = shard.columns
            codes = stored.rows("", columns // 2, [(0, shard.shape[0])], (a // 2, b // 2))
        else:
            codes = stored.rows("", 1, [(a * columns // 2, -(-b * columns // 2)) for a, b in shard.rows], (0, 1))
        absmax = stored.read("absmax").view(-1)
        if "nested_offset" in state:
            offset = torch.tensor(float(state["nested_offset"]))
            second, values = stored.read("nested_absmax").view(-1), stored.read("nested_quant_map").view(-1)
            whole = Statistics(None, absmax, second, values, offset)
        else:
            whole = Statistics(absmax.float())
        self.fill(shard, module, codes.to(device), local_statistics(whole, shard), getattr(torch, state["dtype"]))

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


class _Quantizer:
    """Quantizes a shard as its rows come; absmax that cross a cut are reduced over the axis on the way."""

    def __init__(self, scheme: Bnb4bitScheme, shard: Shard, module: nn.Module, axis: Axis, device: Any):
        self.scheme, self.shard, self.module, self.axis, self.device = scheme, shard, module, axis, device
        rows, columns = shard.local_shape
        self.block = local_block(shard)
        self.crossing = cut_crosses_blocks(shard)
        self.codes = hostmem.empty(-(-rows * columns // 2), torch.uint8, device)
        self.absmax = torch.empty(-(-rows * columns // self.block), dtype=torch.float32, device=device)
        blocks = -(-math.prod(shard.shape) // BLOCK)
        self.whole = torch.empty(blocks, dtype=torch.float32, device=device) if self.crossing else self.absmax

    def update(self, rows: Tensor, start: int) -> None:
        quant_type = self.scheme.config.bnb_4bit_quant_type
        at = start * self.shard.local_shape[1]
        if self.crossing:
            absmax, ragged = self._shared_absmax(rows, start)
            codes = reference.encode_4bit(rows, absmax, self.block, quant_type, ragged)
        else:
            codes, absmax = reference.quantize_4bit(rows, self.block, quant_type)
        self.codes[at // 2 : at // 2 + len(codes)] = codes
        self.absmax[at // self.block : at // self.block + len(absmax)] = absmax

    def _shared_absmax(self, rows: Tensor, start: int) -> tuple[Tensor, bool]:
        """absmax of the blocks of 64 under each local block, over all ranks; whether the last is the ragged tail."""
        count, columns = math.prod(self.shard.shape), self.shard.shape[1]
        stop = start + len(rows)
        first, last = start * columns // BLOCK, -(-stop * columns // BLOCK)
        index = block_index(self.shard, start, stop, rows.device) - first
        partial = rows.reshape(-1, self.block).abs().amax(1).float()
        shared = torch.zeros(last - first, device=rows.device).scatter_reduce_(0, index, partial, "amax")
        self._reduce(shared)
        tail = count % BLOCK != 0 and stop * columns == count
        if tail:
            shared[-1].clamp_(min=reference.TINY)
        self.whole[first:last] = shared
        return shared[index], tail and self.shard.columns[-1][1] == columns

    def _reduce(self, absmax: Tensor) -> None:
        """Maximum over the axis. As integers: non-negative floats order the same, and a NaN stays one."""
        self.axis.all_reduce(absmax.view(torch.int32), "max")

    def _gather(self) -> Tensor:
        """All absmax of the weight, on every rank."""
        if self.crossing or self.shard.dim is None:
            return self.whole
        rows, columns = self.shard.shape
        whole = torch.zeros(-(-rows * columns // BLOCK), device=self.device)
        if self.shard.dim == 1:
            ((a, b),) = self.shard.columns
            mine = self.absmax.view(rows, -1)
            whole.view(rows, columns // BLOCK)[:, a // BLOCK : b // BLOCK] = mine
        else:
            for (a, b), local in self.shard.owned:
                length = -(-b * columns // BLOCK) - a * columns // BLOCK
                at = local * columns // BLOCK
                whole[a * columns // BLOCK :][:length] = self.absmax[at : at + length]
        self._reduce(whole)
        return whole

    def finish(self) -> None:
        statistics = Statistics(self.absmax)
        if self.scheme.config.bnb_4bit_use_double_quant:
            statistics = local_statistics(quantize_absmax(self._gather()), self.shard)
        dtype = torch_dtype(self.shard.dtype)
        self.scheme.fill(self.shard, self.module, self.codes, statistics, dtype)
