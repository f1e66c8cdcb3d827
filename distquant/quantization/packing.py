"""The packing of one weight into int32 words with a scale and a zero point per group, and the fields that decide it.

GPTQ, AWQ, and AutoRound's checkpoints in their packings store, for a weight `[N, K]` of `bits` in groups of `g`:

    qweight  int32    GPTQ `[K * bits / 32, N]`, packed along K; AWQ `[K, N / 8]`, packed along N
    qzeros   int32    `[K / g, N * bits / 32]`, packed along N
    scales   float16  `[K / g, N]`, or bfloat16
    g_idx    int32    `[K]`: the group of each input; GPTQ only

    weight[n, k] = scales[g, n] * (code[k, n] - zero[g, n])   in the scales' dtype, as upstream's kernels do
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from distquant.config.checks import where
from distquant.errors import Problem
from distquant.quantization.algorithms.bit_packing import pack_words, unpack_words
from distquant.quantization.algorithms.rtn import Grid
from distquant.sharding.layout import ALL

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The value in each slot of a word of AWQ's."""

ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""A word of ones in every field."""

DECIDING_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "bits": lambda value: value in (2, 3, 4, 8) and value is not True,
    "group_size": lambda value: isinstance(value, int) and (value == -1 or value > 0),
    "sym": lambda value: isinstance(value, bool),
    "desc_act": lambda value: isinstance(value, bool),
}
"""The fields that decide how a module is stored, and the values that they may have."""


@dataclass(frozen=True, slots=True)
class Packing:
    """The way in which one weight is stored.

    Attributes:
        kind: `gptq` stores each zero point less one, `gptq_v2` and `awq` as it is.
        bits: of a code.
        group_size: inputs of a group; -1 = all.
        grid: how it is rounded where it is quantized while it is loaded.
        act_order: True if `g_idx` alone assigns inputs to groups.
        index: True if `g_idx` is stored.
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
        """Groups of a row."""
        group = self.group(inputs)
        return 1 if group == ALL else -(-inputs // group)

    @property
    def reordered(self) -> bool:
        """True if inputs may belong to any group."""
        return self.act_order and self.group_size != -1

    @property
    def order(self) -> tuple[int, ...] | None:
        """Order of the values in a word; None = ascending."""
        return AWQ_ORDER if self.kind == "awq" else None

    def unpack_codes(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Codes `[in, out]` of a `qweight`."""
        return unpack_words(stored, self.bits, 1 if self.kind == "awq" else 0, dtype, self.order)

    def pack_zeros(self, zeros: Tensor) -> Tensor:
        """`qzeros` of zero points uint8 `[groups, out]`; see `unpack_zeros`."""
        if self.kind != "gptq":
            return pack_words(zeros, self.bits, 1, self.order)
        if self.bits == 3:
            return pack_words(zeros.to(torch.int32) - 1 & 7, 3, 1)
        return pack_words(zeros, self.bits, 1) - ONES[self.bits]

    def unpack_zeros(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Zero points `[groups, out]` of a `qzeros`.

        GPTQ's first version stores each less one. The fate of a zero point of 0 then depends on the writer of such
        files: GPTQModel (`utils/model.py`, `convert_gptq_v2_to_v1_format_module`) subtracts from whole words, so that
        fields borrow from the next, but field by field where values straddle words (3 bits).
        """
        if self.kind != "gptq":
            return unpack_words(stored, self.bits, 1, dtype, self.order)
        if self.bits == 3:
            return (unpack_words(stored, 3, 1, torch.int32) + 1 & 7).to(dtype)
        # One addition undoes the borrows of a subtraction from the whole word; field by field they would stay.
        return unpack_words(stored + ONES[self.bits], self.bits, 1, dtype)


def valid_fields(own: Any) -> dict[str, Any]:
    """Of a module's own fields, those that decide how it is stored and have a valid value.

    `problems_of_fields` reports the others. Planning goes on without them, so that all problems are listed.
    """
    if not isinstance(own, Mapping):
        return {}
    return {key: own[key] for key, allowed in DECIDING_FIELDS.items() if key in own and allowed(own[key])}


def problems_of_fields(field: str, pattern: str, own: Any) -> Iterator[Problem]:
    """Faults of a module's own fields, as far as GPTQ knows them."""
    if not isinstance(own, Mapping):
        yield Problem(where(field), f"{pattern!r} has {own!r}, not a dict of fields", "Give a dict")
        return
    for key, allowed in DECIDING_FIELDS.items():
        if key in own and not allowed(own[key]):
            fix = "Give bits 2, 3, 4 or 8, a positive group_size or -1, and true or false for the rest"
            yield Problem(where(field), f"{pattern!r} has {key}={own[key]!r}", fix)


def problems_of_calibration(config: Any) -> Iterator[Problem]:
    """Requests that an unquantized checkpoint cannot meet: all that need activations."""
    if not config.round_to_nearest:
        field = "dataset" if config.dataset is not None else "tokenizer"
        fault = f"{getattr(config, field)!r} asks for calibration, which is not supported"
        fix = "Leave dataset and tokenizer out to round to nearest, or load a checkpoint that was calibrated"
        yield Problem(where(field), fault, fix)
    if config.desc_act:
        fix = "Set it to false, or load a checkpoint that was calibrated"
        yield Problem(where("desc_act"), "the order of activations needs calibration", fix)
