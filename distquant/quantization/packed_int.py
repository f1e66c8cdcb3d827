"""What the methods share that keep integers in int32 words with a scale and a zero point per group of inputs.

GPTQ, AWQ, and AutoRound's checkpoints in their packings store, for a weight `[N, K]` of `bits` in groups of `g`:

    qweight  int32    GPTQ `[K * bits / 32, N]`, packed along K; AWQ `[K, N / 8]`, packed along N
    qzeros   int32    `[K / g, N * bits / 32]`, packed along N
    scales   float16  `[K / g, N]`, or bfloat16
    g_idx    int32    `[K]`: the group of each input; GPTQ only

    weight[n, k] = scales[g, n] * (code[k, n] - zero[g, n])   in the scales' dtype, as upstream's kernels do

A cut of N falls between words, a cut of K between groups. Where inputs were quantized in the order of their
activations, `g_idx` is no sequence: it is cut like K, and every rank keeps scales and zeros of all groups.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from distquant.config import QuantizationConfig
from distquant.config.checks import where
from distquant.errors import InputError, Problem
from distquant.quantization.algorithms.bit_packing import pack_bytes, pack_factor, pack_words, unpack_words
from distquant.quantization.algorithms.rtn import Grid, quantize_rtn, rows_at_once
from distquant.quantization.module_selection import one_of
from distquant.quantization.scheme import Stream
from distquant.quantization.weight_only import FLOATS, WeightOnlyScheme, wrong_dtypes
from distquant.sharding.layout import ALL, PLAIN_STEPS, Component, Layout
from distquant.sharding.shard import Shard
from distquant.sharding.tally import WHOLE_ROW, Tally

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The value in each slot of a word of AWQ's."""

OTHER_CHECKPOINT = "The checkpoint is of another model or method; check config.json"

ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""A word of ones in every field."""

DECIDING: Mapping[str, Callable[[Any], bool]] = {
    "bits": lambda value: value in (2, 3, 4, 8) and value is not True,
    "group_size": lambda value: isinstance(value, int) and (value == -1 or value > 0),
    "sym": lambda value: isinstance(value, bool),
    "desc_act": lambda value: isinstance(value, bool),
}
"""The fields that decide how a module is stored, and what values they may have."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How one weight is stored.

    Attributes:
        kind: `gptq` stores each zero point less one, `gptq_v2` and `awq` as it is.
        bits: of a code.
        group_size: inputs of a group; -1 = all.
        grid: how it is rounded where it is quantized on the way.
        act_order: whether groups are told by `g_idx` alone.
        index: whether `g_idx` is stored.
    """

    kind: Literal["gptq", "gptq_v2", "awq"]
    bits: int
    group_size: int
    grid: Grid
    act_order: bool = False
    index: bool = False

    def group(self, inputs: int) -> int:
        """Inputs that share a scale, of a weight with that many; `ALL` where all do."""
        return ALL if self.group_size == -1 or self.group_size >= inputs else self.group_size

    def groups(self, inputs: int) -> int:
        group = self.group(inputs)
        return 1 if group == ALL else -(-inputs // group)

    @property
    def gathered(self) -> bool:
        """Whether inputs may belong to any group."""
        return self.act_order and self.group_size != -1

    @property
    def order(self) -> tuple[int, ...] | None:
        return AWQ_ORDER if self.kind == "awq" else None


def valid_fields(own: Any) -> dict[str, Any]:
    """Of a module's own fields, those that say how it is stored, where their values can be meant.

    The rest is told by `problems_of_fields`; planning goes on without it, so that all problems are told.
    """
    if not isinstance(own, Mapping):
        return {}
    return {key: own[key] for key, allowed in DECIDING.items() if key in own and allowed(own[key])}


def problems_of_fields(field: str, pattern: str, own: Any) -> Iterator[Problem]:
    """What is wrong with a module's own fields, as far as GPTQ knows them."""
    if not isinstance(own, Mapping):
        yield Problem(where(field), f"{pattern!r} has {own!r}, which is no dict of fields", "Give a dict")
        return
    for key, allowed in DECIDING.items():
        if key in own and not allowed(own[key]):
            fix = "Give bits 2, 3, 4 or 8, a positive group_size or -1, and true or false for the rest"
            yield Problem(where(field), f"{pattern!r} has {key}={own[key]!r}", fix)


class PackedIntScheme(WeightOnlyScheme):
    """Integers in words, with a scale and a zero point per group."""

    suffixes: ClassVar[Mapping[str, str]] = {name: name for name in ("qweight", "qzeros", "scales", "g_idx")}

    def __init__(self, config: QuantizationConfig):
        super().__init__(config)
        self._packings: dict[str, Packing] = {}

    @abstractmethod
    def packing_of(self, module: str) -> Packing:
        """How the weight of a module is stored."""

    def packing(self, name: str) -> Packing:
        """How a parameter is stored."""
        module = one_of(name.removesuffix(".weight"))
        if module not in self._packings:
            self._packings[module] = self.packing_of(module)
        return self._packings[module]

    # -- deciding --------------------------------------------------------------------------------------------------

    def layout(self, name: str, shape: tuple[int, ...], dtype: str) -> Layout:
        packing = self.packing(name)
        per, words = pack_factor(packing.bits)
        group = packing.group(shape[1])
        count = 1
        if packing.gathered and group != ALL:
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

    def shard_nbytes(self, shard: Shard) -> int:
        return self.layout(*self._local(shard)).nbytes(shard.local_shape)

    @staticmethod
    def _local(shard: Shard) -> tuple[str, tuple[int, int], str]:
        """The layout is that of the whole: the number of groups that a shard keeps may not follow from its size."""
        return shard.name, shard.shape, shard.dtype

    def check_weight(self, name: str, shape: tuple[int, ...]) -> list[Problem]:
        packing, (rows, columns) = self.packing(name), shape
        per, words = pack_factor(packing.bits)
        fix = "Leave this module out, or choose another method"
        found = []
        if rows % per:
            what = f"{rows} outputs; {per} zero points of {packing.bits} bits are packed into {words} word(s)"
            found.append(Problem(name, what, fix))
        if packing.kind != "awq" and columns % per:
            what = f"{columns} inputs; {per} codes of {packing.bits} bits are packed into {words} word(s)"
            found.append(Problem(name, what, fix))
        group = packing.group(columns)
        if packing.kind == "awq" and group != ALL and columns % group:
            what, fix = f"{columns} inputs are no multiple of the group size {group}", f"Give another group_size. {fix}"
            found.append(Problem(name, what, fix))
        return found

    def check_stored(self, name: str, shape: tuple[int, ...], stored: dict[str, tuple[int, ...]]) -> list[Problem]:
        found = self.check_weight(name, shape)
        packing = self.packing(name)
        if "" in stored:
            what = "is stored unquantized, and the config has it quantized"
            return [*found, Problem(name, what, "Correct which modules config.json says are quantized")]
        for component in self.layout(name, shape, "float32").components:
            expected = component.shape(shape)
            if component.name == "g_idx":
                expected = shape[1:]
                if component.name not in stored and not packing.gathered:
                    continue
            if component.name not in stored:
                what = f"the checkpoint lacks {component.name} of this quantized weight"
                found.append(Problem(name, what, "Download the checkpoint again, or quantize the original"))
            elif stored[component.name] != expected:
                have = list(stored[component.name])
                what = f"{component.name} is stored as {have}, its config and shape need {list(expected)}"
                found.append(Problem(name, what, OTHER_CHECKPOINT))
        return found

    def check_dtypes(self, name: str, dtypes: dict[str, str]) -> list[Problem]:
        words = {"qweight": ("I32",), "qzeros": ("I32",), "g_idx": ("I32", "I64")}
        return wrong_dtypes(name, dtypes, {**words, "scales": FLOATS})

    # -- pre-quantized ---------------------------------------------------------------------------------------------

    def pack_prequantized(self, shard: Shard, parts: dict[str, Tensor], whole: frozenset[str]) -> dict[str, Tensor]:
        packing, index = self.packing(shard.name), parts.get("g_idx")
        if index is not None:
            self._check_index(shard, index.long(), "g_idx" in whole)
        found = self.shaped(shard, {name: value for name, value in parts.items() if name != "g_idx"})
        if packing.gathered:
            assert index is not None
            return {**found, "g_idx": index.to(torch.int32)}
        return {**found, **self._sequence(shard, found["scales"].device)}

    def _check_index(self, shard: Shard, index: Tensor, whole: bool) -> None:
        """Whether the groups of the inputs are those that the config promises."""
        packing, inputs = self.packing(shard.name), shard.shape[1]
        if packing.gathered:
            count = packing.groups(inputs)
            low, high = (int(bound) for bound in index.aminmax()) if len(index) else (0, 0)
            if low < 0 or high >= count:
                what = f"g_idx names groups {low} to {high}, and there are {count}"
                raise InputError.one(shard.name, what, OTHER_CHECKPOINT)
            return
        group = packing.group(inputs)
        segments = ((0, inputs),) if whole else shard.columns
        expected = torch.cat([torch.arange(start, stop, device=index.device) for start, stop in segments])
        if not torch.equal(index, expected // (inputs if group == ALL else group)):
            what = "g_idx is no sequence of groups, and the config says desc_act=false"
            raise InputError.one(shard.name, what, "Set desc_act to true in config.json if inputs were reordered")

    def _sequence(self, shard: Shard, device: torch.device) -> dict[str, Tensor]:
        """The `g_idx` of a shard whose groups lie in order; empty where the packing has none."""
        packing, inputs = self.packing(shard.name), shard.local_shape[1]
        if not packing.index:
            return {}
        group = packing.group(shard.shape[1])
        numbers = torch.arange(inputs, dtype=torch.int32, device=device)
        return {"g_idx": torch.zeros_like(numbers) if group == ALL else numbers // group}

    # -- on the way ------------------------------------------------------------------------------------------------

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

    def encode(self, name: str, rows: Tensor, out: dict[str, Tensor], ops: Any) -> None:
        packing, (n, columns) = self.packing(name), rows.shape
        per = pack_factor(packing.bits)[0]
        size = columns if packing.group_size == -1 else min(packing.group_size, columns)
        by_rows = packing.kind == "awq"
        codes = out["qweight"].view(n // per, columns) if by_rows else out["qweight"].view(torch.uint8).view(n, -1)
        scales, zeros = out["scales"].view(n, -1), out["qzeros"].view(n, -1)
        step = rows_at_once(columns, per if by_rows else 1)
        for at in range(0, n, step):
            here = slice(at, at + step)
            found, scales[here], zeros[here] = quantize_rtn(rows[here], size, packing.grid)
            if by_rows:
                codes[at // per : (at + step) // per] = pack_words(found, packing.bits, 0, packing.order)
            else:
                codes[here] = found if packing.bits == 3 else pack_bytes(found, packing.bits)

    def pack(self, shard: Shard, parts: dict[str, Tensor], ops: Any) -> dict[str, Tensor]:
        packing, (rows, _) = self.packing(shard.name), shard.local_shape
        if packing.kind == "awq":
            codes = parts["qweight"].view(rows // pack_factor(packing.bits)[0], -1).t().contiguous()
        elif packing.bits == 3:
            codes = pack_words(parts["qweight"].view(rows, -1).t(), 3, 0)
        else:
            codes = parts["qweight"].view(rows, -1).t().contiguous()
        zeros = self._stored_zeros(packing, parts["qzeros"].view(rows, -1).t())
        scales = parts["scales"].view(rows, -1).t().contiguous()
        return {"qweight": codes, "qzeros": zeros, "scales": scales, **self._sequence(shard, scales.device)}

    # -- using -----------------------------------------------------------------------------------------------------

    @staticmethod
    def _stored_zeros(packing: Packing, zeros: Tensor) -> Tensor:
        """qzeros from zero points uint8 `[groups, out]`; see `zeros_of`."""
        if packing.kind != "gptq":
            return pack_words(zeros, packing.bits, 1, packing.order)
        if packing.bits == 3:
            return pack_words(zeros.to(torch.int32) - 1 & 7, 3, 1)
        return pack_words(zeros, packing.bits, 1) - ONES[packing.bits]

    @staticmethod
    def zeros_of(packing: Packing, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Zero points `[groups, out]`.

        GPTQ's first version stores each less one. What becomes of a zero point of 0 then follows who writes such
        files: GPTQModel (`utils/model.py`, `convert_gptq_v2_to_v1_format_module`) subtracts from whole words, so that
        fields borrow from the next, but field by field where values straddle words (3 bits).
        """
        if packing.kind != "gptq":
            return unpack_words(stored, packing.bits, 1, dtype, packing.order)
        if packing.bits == 3:
            return (unpack_words(stored, 3, 1, torch.int32) + 1 & 7).to(dtype)
        return unpack_words(stored + ONES[packing.bits], packing.bits, 1, dtype)

    def _codes(self, packing: Packing, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Codes `[in, out]`."""
        return unpack_words(stored, packing.bits, 1 if packing.kind == "awq" else 0, dtype, packing.order)

    def dequantize(self, shard: Shard, components: Mapping[str, Tensor], dtype: torch.dtype, ops: Any) -> Tensor:
        packing, scales = self.packing(shard.name), components["scales"]
        weight = self._codes(packing, components["qweight"], scales.dtype)
        zeros = self.zeros_of(packing, components["qzeros"], scales.dtype)
        inputs = len(weight)
        if packing.gathered:
            index = components["g_idx"].long()
            return weight.sub_(zeros[index]).mul_(scales[index]).to(dtype).t()
        group = inputs if packing.group(shard.shape[1]) == ALL else packing.group_size
        whole = inputs // group
        for part, at, size in (
            (weight[: whole * group], slice(0, whole), group),
            (weight[whole * group :], slice(whole, None), 0),
        ):
            if len(part):
                grouped = part.unflatten(0, (-1, size or len(part)))
                grouped.sub_(zeros[at].unsqueeze(1)).mul_(scales[at].unsqueeze(1))
        return weight.to(dtype).t()

    def tally(self, module: Any, shard: Shard, tally: Tally) -> None:
        if module.counted is not None:
            tally.again(module.counted)
        else:
            super().tally(module, shard, tally)

    def fingerprint_streams(self, shard: Shard, components: Mapping[str, Tensor]) -> Iterable[Stream]:
        packing = self.packing(shard.name)
        yield "code", self._codes(packing, components["qweight"], torch.uint8).t(), 1
        scales, zeros = components["scales"].float(), self.zeros_of(packing, components["qzeros"], torch.uint8)
        span = packing.group(shard.shape[1])
        if packing.gathered:
            index, span = components["g_idx"].long(), 1
            scales, zeros = scales[index], zeros[index]
        span = WHOLE_ROW if span == ALL else span
        yield "scale", scales.t(), span
        yield "zero", zeros.t(), span
