"""bitsandbytes NF4 and FP4, with and without double quantization, exact at every width.

Codes: two a byte, the even element in the high nibble, row-major; absmax per 64 elements of the flattened weight, which
straddle rows where a row is not a multiple of 64. Double quantization subtracts the mean of all absmax and stores them
as 8-bit codes with one float32 per 256 (bitsandbytes `functional.quantize_4bit`). Neither mean nor second-level blocks
are local to a shard, so every rank gets all absmax (1/64 of the elements) and quantizes the whole, on one thread:
`mean` over one and over two threads differ in the last bit. A shard keeps the nested form where its blocks are whole
runs of 256, and otherwise stores the same values as float32 absmax.

Along `in` a shard may need blocks of 32 where 64 would straddle its rows: absmax are then repeated, which changes no
value. Whole rows are quantized before they are split, so a partition may divide a block of 64.

Stored components of a shard:

    ""                uint8 `[ceil(n / 2)]`, the codes
    absmax            float32 `[blocks]`; nested: uint8 `[blocks]`, second-level codes
    nested_absmax     float32 `[ceil(blocks / 256)]`; these and what follows only where the shard keeps nesting
    nested_offset     float32 `[]`
    nested_quant_map  float32 `[256]`, the value of each second-level code, only where a checkpoint has other bits than
                      bitsandbytes computes here (torch's `linspace` rounds differently without AVX2)

Values of 4-bit codes and block sizes follow from the configuration and the shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distquant.config import Bnb4bitConfig, torch_dtype
from distquant.dtypes import DTYPE_BYTES, STORED_NAMES
from distquant.errors import InputError, Problem
from distquant.kernels import reference
from distquant.kernels.protocol import Kernels
from distquant.quantization.algorithms.nested_absmax import (
    BLOCK,
    FINE_BLOCK,
    SECOND,
    Statistics,
    dynamic_map,
    keeps_nesting,
    local_block,
    local_statistics,
    partition_crosses_blocks,
    quantize_absmax,
)
from distquant.quantization.algorithms.quant_state import LONGEST, is_nested, read_state
from distquant.quantization.bitsandbytes_base import BitsandbytesScheme
from distquant.quantization.codec import Stream
from distquant.quantization.linear.linear4bit_components import components_of
from distquant.quantization.registry import register
from distquant.quantization.stored_checks import OTHER_CHECKPOINT, lacks, misshapen, wrong_dtypes
from distquant.quantization.stored_values import MAGNITUDES, Check, table
from distquant.sharding.layout import Component, Layout
from distquant.sharding.shard import Shard


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
    constants = frozenset(("nested_offset", "nested_quant_map"))
    statistics_on_host = True
    mark = "is_loaded_in_4bit"
    config: Bnb4bitConfig

    def layout(self, name: str, shape: tuple[int, ...], dtype: str) -> Layout:
        word = DTYPE_BYTES[self.config.bnb_4bit_quant_storage]
        codes = Component(name="", dtype=self.config.bnb_4bit_quant_storage, flat=2 * word)
        blocks = (BLOCK, FINE_BLOCK)
        if not self.config.bnb_4bit_use_double_quant:
            return Layout((codes, Component(name="absmax", dtype="float32", flat=BLOCK, preferred_alignments=blocks)))
        return Layout(
            (
                codes,
                Component(name="absmax", dtype="uint8", flat=BLOCK, preferred_alignments=blocks),
                Component(name="nested_absmax", dtype="float32", flat=BLOCK * SECOND, replicated=True),
            )
        )

    def shard_nbytes(self, shard: Shard) -> int:
        count = math.prod(shard.local_shape)
        blocks = -(-count // local_block(shard))
        nested = self.config.bnb_4bit_use_double_quant and keeps_nesting(shard)
        return -(-count // 2) + (blocks + 4 * -(-blocks // SECOND) if nested else 4 * blocks)

    def encoded_components(self, name: str, shape: tuple[int, int], dtype: str) -> tuple[Component, ...]:
        """Codes by the byte, and all absmax: `pack` makes the second level of them."""
        return (
            Component(name="", dtype="uint8", flat=2),
            Component(name="absmax", dtype="float32", flat=BLOCK),
        )

    def replicated_components(self, shard: Shard) -> frozenset[str]:
        """absmax: all of them for a second level, and where a partition of `in` is finer than the blocks."""
        if self.config.bnb_4bit_use_double_quant or partition_crosses_blocks(shard):
            return frozenset(("absmax",))
        return frozenset()

    def check_weight(self, name: str, shape: tuple[int, ...]) -> list[Problem]:
        word = 2 * DTYPE_BYTES[self.config.bnb_4bit_quant_storage]
        if math.prod(shape) % word == 0:
            return []
        fault = f"{math.prod(shape)} weights do not fill whole words of {word} ({self.config.bnb_4bit_quant_storage})"
        return [Problem(name, fault, "Use bnb_4bit_quant_storage='uint8', or skip the module")]

    def check_stored(self, name: str, shape: tuple[int, ...], stored: dict[str, tuple[int, ...]]) -> list[Problem]:
        nested = self.config.bnb_4bit_use_double_quant
        needed = ["", "absmax", "quant_map", "quant_state"] + ["nested_absmax", "nested_quant_map"] * nested
        missing = [component or "weight" for component in needed if component not in stored]
        if missing:
            return [lacks(name, ", ".join(missing))]
        blocks, count = -(-math.prod(shape) // BLOCK), math.prod(stored["absmax"])
        if count != blocks:
            fault = f"{count} absmax for a weight of shape {list(shape)}, blocks of {BLOCK} give {blocks}"
            return [Problem(name, fault, f"Only blocks of {BLOCK} are supported; quantize the original again")]
        problems = []
        codes = -(-math.prod(shape) // (2 * DTYPE_BYTES[self.config.bnb_4bit_quant_storage]))
        sizes = {"": codes, "quant_map": 16, "nested_quant_map": 256, "nested_absmax": -(-blocks // SECOND)}
        for component, size in sizes.items():
            if component in stored and math.prod(stored[component]) != size:
                problems.append(misshapen(name, component, stored[component], (size,)))
        nbytes = math.prod(stored["quant_state"])
        if nbytes > LONGEST:
            fault = f"quant_state takes {nbytes} bytes, at most {LONGEST} are read"
            problems.append(Problem(name, fault, OTHER_CHECKPOINT))
        return problems

    def check_dtypes(self, name: str, dtypes: dict[str, str]) -> list[Problem]:
        floats = dict.fromkeys(("quant_map", "nested_absmax", "nested_quant_map"), ("F32",))
        absmax = ("U8",) if "nested_absmax" in dtypes else ("F32",)
        storage = (STORED_NAMES[self.config.bnb_4bit_quant_storage],)
        return wrong_dtypes(name, dtypes, {"": storage, "absmax": absmax, **floats, "quant_state": ("U8",)})

    def value_check(self, name: str, component: str) -> Check | None:
        """The tables that kernels have built in, and floats; second-level codes (uint8) are any."""
        quant_type = self.config.bnb_4bit_quant_type
        checks: dict[str, Check] = {
            "quant_map": table(lambda device: reference.code_values(quant_type, device), f"{quant_type}'s"),
            "nested_quant_map": table(dynamic_map, "bitsandbytes' own"),
            "absmax": MAGNITUDES,
            "nested_absmax": MAGNITUDES,
        }
        return checks.get(component)

    # -- modules ---------------------------------------------------------------------------------------------------

    def module(self, linear: nn.Module, shard: Shard) -> nn.Module:
        import bitsandbytes as bnb

        from distquant.quantization.linear.unaligned_linear4bit import UnalignedLinear4bit

        out_features, in_features = shard.local_shape
        kind = UnalignedLinear4bit if in_features % local_block(shard) else bnb.nn.Linear4bit
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

    def encode(self, name: str, rows: Tensor, out: dict[str, Tensor], ops: Kernels) -> None:
        ops.quantize_4bit(rows, BLOCK, self.config.bnb_4bit_quant_type, codes=out[""], absmax=out["absmax"])

    def load_prequantized(
        self, shard: Shard, module: nn.Module, parts: dict[str, Tensor], replicated: frozenset[str]
    ) -> None:
        super().load_prequantized(shard, module, parts, replicated)
        # The dtype that the file was quantized from, which may be another than that of this load.
        module.weight.quant_state.dtype = torch_dtype(self._state_of(shard, parts)["dtype"])  # type: ignore[union-attr]

    def pack(self, shard: Shard, parts: dict[str, Tensor], ops: Kernels) -> dict[str, Tensor]:
        device = parts[""].device
        if self.config.bnb_4bit_use_double_quant:
            statistics = quantize_absmax(parts["absmax"], shard, ops, device)
        else:
            statistics = Statistics(parts["absmax"].to(device, non_blocking=True))
            if self.replicated_components(shard):
                statistics = local_statistics(statistics, shard, ops)
        return {"": parts[""], **statistics.components()}

    def pack_prequantized(
        self, shard: Shard, parts: dict[str, Tensor], replicated: frozenset[str]
    ) -> dict[str, Tensor]:
        state = self._state_of(shard, parts)
        codes, columns = parts[""].view(torch.uint8), shard.shape[1]
        if "" in replicated and shard.shard_dim == 0:
            codes = torch.cat([codes[a * columns // 2 : -(-b * columns // 2)] for a, b in shard.rows])
        statistics = Statistics(parts["absmax"].float())
        if is_nested(state):
            offset = torch.tensor(float(state["nested_offset"]), dtype=torch.float32, device=codes.device)
            values = parts["nested_quant_map"]
            ours = torch.equal(values, dynamic_map(values.device))
            statistics = Statistics(None, parts["absmax"], parts["nested_absmax"], offset, None if ours else values)
        if "absmax" in replicated:
            statistics = local_statistics(statistics, shard)
        return {"": codes, **statistics.components()}

    def _state_of(self, shard: Shard, parts: Mapping[str, Tensor]) -> dict[str, Any]:
        """The `quant_state` of a stored weight; raises `InputError` where it contradicts what is stored beside it."""
        state = read_state(shard.name, parts["quant_state"], self.config.bnb_4bit_quant_type, shard.shape)
        if is_nested(state) != ("nested_absmax" in parts):
            has, lacks_it = ("quant_state", "nested_absmax") if is_nested(state) else ("nested_absmax", "quant_state")
            fault = f"it is double quantized by its {has}, and not by its {lacks_it}"
            raise InputError.one(shard.name, fault, OTHER_CHECKPOINT)
        return state

    def fill(self, shard: Shard, module: Any, components: Mapping[str, Tensor]) -> None:
        from bitsandbytes.functional import QuantState
        from bitsandbytes.nn import Params4bit

        device, quant_type = components[""].device, self.config.bnb_4bit_quant_type
        state = QuantState(
            absmax=components["absmax"],
            shape=torch.Size(shard.local_shape),
            code=reference.code_values(quant_type, device).clone(),  # saving refuses shared tensors
            blocksize=local_block(shard),
            quant_type=quant_type,
            dtype=torch_dtype(shard.dtype),
        )
        if "nested_absmax" in components:
            values = components.get("nested_quant_map", dynamic_map(device)).clone()
            state.offset, state.nested = components["nested_offset"], True
            state.state2 = QuantState(
                absmax=components["nested_absmax"], code=values, blocksize=SECOND, dtype=torch.float32
            )
        state.to(device)
        storage = torch_dtype(self.config.bnb_4bit_quant_storage)
        module.weight = Params4bit(
            components[""].view(storage).view(-1, 1),
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

    def components(self, module: Any) -> dict[str, Tensor]:
        return components_of(module)

    def held_nbytes(self, module: nn.Module) -> int:
        """Bytes of its components; the state dict would cost a quantization state as JSON for each module."""
        return sum(value.nbytes for name, value in components_of(module).items() if name not in self.constants)

    def dequantize(self, shard: Shard, components: Mapping[str, Tensor], dtype: torch.dtype, ops: Kernels) -> Tensor:
        """By the flat definition, in float32 and then rounded to `dtype`."""
        absmax, quant_type = Statistics.of(components).effective(ops), self.config.bnb_4bit_quant_type
        return ops.dequantize_4bit(
            components[""], absmax, local_block(shard), quant_type, shard.local_shape, dtype=dtype
        )

    def dequantized(self, module: Any, shard: Shard, ops: Kernels) -> Tensor:
        weight = self.dequantize(shard, self.components(module), module.weight.quant_state.dtype, ops)
        return weight.to(torch_dtype(shard.dtype))

    def fingerprint_streams(self, shard: Shard, components: Mapping[str, Tensor]) -> Iterable[Stream]:
        rows, columns = shard.local_shape
        yield "code", reference.unpack_4bit(components[""])[: rows * columns].view(rows, columns), 1
        absmax, block = Statistics.of(components).effective(), local_block(shard)
        if columns % block:
            absmax, block = absmax.repeat_interleave(block)[: rows * columns], 1
        yield "scale", absmax.view(rows, columns // block), block
