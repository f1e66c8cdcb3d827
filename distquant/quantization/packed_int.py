"""The base of methods that keep integers in int32 words with a scale and a zero point per group of inputs.

`packing.py` gives the stored tensors and their arithmetic. A partition of N falls between words, a partition of K
between groups. Where inputs were quantized in the order of their activations, `g_idx` is not a sequence: it is split
like K, and every rank keeps scales and zeros of all groups.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from distquant.config import QuantizationConfig
from distquant.errors import InputError, Problem
from distquant.kernels.protocol import Kernels
from distquant.quantization.algorithms.bit_packing import pack_bytes, pack_factor, pack_words
from distquant.quantization.algorithms.rtn import quantize_rtn, rows_at_once
from distquant.quantization.codec import Encoder, Stream
from distquant.quantization.module_selection import first_expert_name
from distquant.quantization.packing import Packing
from distquant.quantization.stored_checks import OTHER_CHECKPOINT, SCALE_DTYPES, lacks, misshapen, wrong_dtypes
from distquant.quantization.stored_values import FINITE, Check
from distquant.quantization.weight_only import WeightOnlyScheme
from distquant.sharding.layout import ALL, PLAIN_STEPS, Component, Layout
from distquant.sharding.shard import Shard
from distquant.sharding.tally import WHOLE_ROW, Tally


class PackedIntScheme(WeightOnlyScheme, Encoder):
    """Integers in words, with a scale and a zero point per group."""

    suffixes: ClassVar[Mapping[str, str]] = {name: name for name in ("qweight", "qzeros", "scales", "g_idx")}
    value_checks: ClassVar[Mapping[str, Check]] = {"scales": FINITE}

    def __init__(self, config: QuantizationConfig):
        super().__init__(config)
        self._packings: dict[str, Packing] = {}

    @abstractmethod
    def packing_of(self, module: str) -> Packing:
        """Reads from the configuration how the weight of a module is stored."""

    def packing(self, name: str) -> Packing:
        """The packing of a parameter."""
        module = first_expert_name(name.removesuffix(".weight"))
        if module not in self._packings:
            self._packings[module] = self.packing_of(module)
        return self._packings[module]

    # -- layout rules ----------------------------------------------------------------------------------------------

    def layout(self, name: str, shape: tuple[int, ...], dtype: str) -> Layout:
        packing = self.packing(name)
        per, words = pack_factor(packing.bits)
        group, count = packing.group(shape[1]), 1
        if packing.reordered and group != ALL:
            # `g_idx` may name any group, so a slice of the inputs needs the scales of all of them.
            group, count = ALL, packing.groups(shape[1])
        if packing.kind == "awq":
            codes = Component(
                name="qweight", dtype="int32", block_shape=(per, 1), transposed=True, preferred_alignments=PLAIN_STEPS
            )
        else:
            codes = Component(
                name="qweight", dtype="int32", block_shape=(1, per), stored_per_block=(1, words), transposed=True
            )
        scales = Component(
            name="scales", dtype="float16", block_shape=(1, group), stored_per_block=(1, count), transposed=True
        )
        zeros = Component(
            name="qzeros", dtype="int32", block_shape=(per, group), stored_per_block=(words, count), transposed=True
        )
        index = (Component(name="g_idx", dtype="int32", block_shape=(ALL, 1)),) if packing.index else ()
        return Layout((codes, zeros, scales, *index))

    def local_layout(self, shard: Shard) -> Layout:
        """The layout of the whole weight: the groups that a shard keeps may not follow from its own size."""
        return self.layout(shard.name, shard.shape, shard.dtype)

    def shard_nbytes(self, shard: Shard) -> int:
        return self.local_layout(shard).nbytes(shard.local_shape)

    def check_weight(self, name: str, shape: tuple[int, ...]) -> list[Problem]:
        packing, (rows, columns) = self.packing(name), shape
        per, words = pack_factor(packing.bits)
        fix = "Leave this module out, or choose another method"
        problems = []
        if rows % per:
            fault = f"{rows} outputs; {per} zero points of {packing.bits} bits are packed into {words} word(s)"
            problems.append(Problem(name, fault, fix))
        if packing.kind != "awq" and columns % per:
            fault = f"{columns} inputs; {per} codes of {packing.bits} bits are packed into {words} word(s)"
            problems.append(Problem(name, fault, fix))
        return problems

    def group_size(self, name: str, shape: tuple[int, ...]) -> int | None:
        """AWQ's, whose kernels take whole groups only; the last group of GPTQ may be short."""
        packing = self.packing(name)
        group = packing.group(shape[1])
        return group if packing.kind == "awq" and group != ALL else None

    def check_stored(self, name: str, shape: tuple[int, ...], stored: dict[str, tuple[int, ...]]) -> list[Problem]:
        problems = self.check_weight(name, shape)
        packing, group = self.packing(name), self.group_size(name, shape)
        if group and shape[1] % group:
            fault = f"in_features {shape[1]} is not a multiple of group_size={group}"
            problems.append(Problem(name, fault, OTHER_CHECKPOINT))
        if "" in stored:
            fault = "is stored unquantized, and the config has it quantized"
            return [*problems, Problem(name, fault, "Correct which modules config.json says are quantized")]
        missing: list[str] = []
        for component in self.layout(name, shape, "float32").components:
            expected = component.shape(shape)
            if component.name == "g_idx":
                expected = shape[1:]
                if component.name not in stored and not packing.reordered:
                    continue
            if component.name not in stored:
                missing.append(component.name)
            elif stored[component.name] != expected:
                problems.append(misshapen(name, component.name, stored[component.name], expected))
        return [*problems, lacks(name, ", ".join(missing))] if missing else problems

    def check_dtypes(self, name: str, dtypes: dict[str, str]) -> list[Problem]:
        words = {"qweight": ("I32",), "qzeros": ("I32",), "g_idx": ("I32", "I64")}
        return wrong_dtypes(name, dtypes, {**words, "scales": SCALE_DTYPES})

    def encoded_components(self, name: str, shape: tuple[int, int], dtype: str) -> tuple[Component, ...]:
        """Codes packed along the dim along which they are stored (3 bits: one a byte); zeros are packed last."""
        packing = self.packing(name)
        per, group = pack_factor(packing.bits)[0], packing.group(shape[1])
        codes = Component(name="qweight", dtype="uint8")
        if packing.kind == "awq":
            codes = Component(name="qweight", dtype="int32", block_shape=(per, 1))
        elif packing.bits != 3:
            codes = Component(name="qweight", dtype="int32", block_shape=(1, per))
        scales = Component(name="scales", dtype="float16", block_shape=(1, group))
        return codes, scales, Component(name="qzeros", dtype="uint8", block_shape=(1, group))

    # -- codec -----------------------------------------------------------------------------------------------------

    def encode(self, name: str, rows: Tensor, out: dict[str, Tensor], ops: Kernels) -> None:
        packing, (n, columns) = self.packing(name), rows.shape
        per = pack_factor(packing.bits)[0]
        size = columns if packing.group_size == -1 else min(packing.group_size, columns)
        by_rows = packing.kind == "awq"
        codes = out["qweight"].view(n // per, columns) if by_rows else out["qweight"].view(torch.uint8).view(n, -1)
        scales, zeros = out["scales"].view(n, -1), out["qzeros"].view(n, -1)
        step = rows_at_once(columns, rows.device, per if by_rows else 1)
        for start in range(0, n, step):
            tile = slice(start, start + step)
            values, scales[tile], zeros[tile] = quantize_rtn(rows[tile], size, packing.grid)
            if by_rows:
                codes[start // per : (start + step) // per] = pack_words(values, packing.bits, 0, packing.order)
            else:
                codes[tile] = values if packing.bits == 3 else pack_bytes(values, packing.bits)

    def pack(self, shard: Shard, parts: dict[str, Tensor], ops: Kernels) -> dict[str, Tensor]:
        packing, (rows, _) = self.packing(shard.name), shard.local_shape
        if packing.kind == "awq":
            codes = parts["qweight"].view(rows // pack_factor(packing.bits)[0], -1).t().contiguous()
        elif packing.bits == 3:
            codes = pack_words(parts["qweight"].view(rows, -1).t(), 3, 0)
        else:
            codes = parts["qweight"].view(rows, -1).t().contiguous()
        zeros = packing.pack_zeros(parts["qzeros"].view(rows, -1).t())
        scales = parts["scales"].view(rows, -1).t().contiguous()
        return {"qweight": codes, "qzeros": zeros, "scales": scales, **self._ordered_index(shard, scales.device)}

    def pack_prequantized(
        self, shard: Shard, parts: dict[str, Tensor], replicated: frozenset[str]
    ) -> dict[str, Tensor]:
        packing, index = self.packing(shard.name), parts.get("g_idx")
        if index is not None:
            self._check_index(shard, index.long(), "g_idx" in replicated)
        components = self.shaped(shard, {name: value for name, value in parts.items() if name != "g_idx"})
        if packing.reordered:
            assert index is not None
            return {**components, "g_idx": index.to(torch.int32)}
        return {**components, **self._ordered_index(shard, components["scales"].device)}

    def _check_index(self, shard: Shard, index: Tensor, replicated: bool) -> None:
        """Raises `InputError` where the groups of the inputs are not those that the config promises."""
        packing, inputs = self.packing(shard.name), shard.shape[1]
        if packing.reordered:
            fault = _group_fault(index, packing, inputs, replicated or shard.shard_dim != 1)
            if fault is not None:
                raise InputError.one(shard.name, fault, OTHER_CHECKPOINT)
            return
        group = packing.group(inputs)
        segments = ((0, inputs),) if replicated else shard.columns
        expected = torch.cat([torch.arange(start, stop, device=index.device) for start, stop in segments])
        if not torch.equal(index, expected // (inputs if group == ALL else group)):
            fault = "g_idx is not a sequence of groups, and the config says desc_act=false"
            raise InputError.one(shard.name, fault, "Set desc_act to true in config.json if inputs were reordered")

    def _ordered_index(self, shard: Shard, device: torch.device) -> dict[str, Tensor]:
        """The `g_idx` of a shard whose groups are in order; empty where the packing has none."""
        packing, inputs = self.packing(shard.name), shard.local_shape[1]
        if not packing.index:
            return {}
        group = packing.group(shard.shape[1])
        numbers = torch.arange(inputs, dtype=torch.int32, device=device)
        return {"g_idx": torch.zeros_like(numbers) if group == ALL else numbers // group}

    def dequantize(self, shard: Shard, components: Mapping[str, Tensor], dtype: torch.dtype, ops: Kernels) -> Tensor:
        packing, scales = self.packing(shard.name), components["scales"]
        weight = packing.unpack_codes(components["qweight"], scales.dtype)
        zeros = packing.unpack_zeros(components["qzeros"], scales.dtype)
        inputs = len(weight)
        if packing.reordered:
            index = components["g_idx"].long()
            return weight.sub_(zeros[index]).mul_(scales[index]).to(dtype).t()
        group = inputs if packing.group(shard.shape[1]) == ALL else packing.group_size
        # In place and by whole groups, so that nothing as large as the weight is made; the last group may be short.
        full = inputs // group
        for part, groups, size in (
            (weight[: full * group], slice(0, full), group),
            (weight[full * group :], slice(full, None), 0),
        ):
            if len(part):
                grouped = part.unflatten(0, (-1, size or len(part)))
                grouped.sub_(zeros[groups].unsqueeze(1)).mul_(scales[groups].unsqueeze(1))
        return weight.to(dtype).t()

    def fingerprint_streams(self, shard: Shard, components: Mapping[str, Tensor]) -> Iterable[Stream]:
        packing = self.packing(shard.name)
        yield "code", packing.unpack_codes(components["qweight"], torch.uint8).t(), 1
        scales, zeros = components["scales"].float(), packing.unpack_zeros(components["qzeros"], torch.uint8)
        width = packing.group(shard.shape[1])
        if packing.reordered:
            # One value an input, so that the count does not depend on the groups' numbers.
            index, width = components["g_idx"].long(), 1
            scales, zeros = scales[index], zeros[index]
        width = WHOLE_ROW if width == ALL else width
        yield "scale", scales.t(), width
        yield "zero", zeros.t(), width

    # -- modules ---------------------------------------------------------------------------------------------------

    def tally(self, module: Any, shard: Shard, tally: Tally) -> None:
        if module.counted is not None:
            tally.again(module.counted)
        else:
            super().tally(module, shard, tally)


def _group_fault(index: Tensor, packing: Packing, inputs: int, whole: bool) -> str | None:
    """The fault of the groups of inputs that may have any order; None if there is none.

    There must be such groups, and each must have its number of inputs: kernels sort the inputs by group, and then take
    as many for each (`gptq_marlin` and `exllama_v2` of GPTQModel).

    Args:
        index: int64, the group of each input.
        packing: of the weight.
        inputs: of the whole weight.
        whole: True if `index` has all of them; a part of them can only show that a group has too many.
    """
    count, size = packing.groups(inputs), packing.group_size
    low, high = (int(bound) for bound in index.aminmax()) if len(index) else (0, 0)
    if low < 0 or high >= count:
        return f"g_idx names groups {low} to {high}, and there are {count}"
    found = torch.bincount(index, minlength=count)
    room = torch.full_like(found, size)
    room[-1] = inputs - (count - 1) * size
    wrong = (found != room) if whole else (found > room)
    if not bool(wrong.any()):
        return None
    group = int(wrong.nonzero()[0])
    return f"g_idx gives group {group} {int(found[group])} inputs, and it has {int(room[group])}"
