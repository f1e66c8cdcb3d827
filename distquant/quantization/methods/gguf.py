"""GGUF: the blocks of llama.cpp's files, kept as they are stored and dequantized in forward.

Each tensor has its own type, which the file's header names; the planner writes the types into the configuration. A
block covers 32 or 256 inputs of one row, so weights are partitioned between blocks along the inputs and anywhere along
the outputs. Parameters of other modules (an embedding), and everything under `dequantize=True`, are dequantized as
their rows pass through. The rows of llama's q and k are stored interleaved within each head, so they are read in whole
heads and put in order where they arrive.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distquant.checkpoint.gguf import BLOCKS
from distquant.config import GgufConfig
from distquant.errors import Problem
from distquant.kernels.protocol import Kernels
from distquant.kernels.reference.gguf import HALVES, dequantize_gguf
from distquant.model.description import ModelDescription
from distquant.quantization.codec import PlainDecoder, Stream
from distquant.quantization.registry import register
from distquant.quantization.scheme import Context
from distquant.quantization.stored_values import FINITE, Check, check_values
from distquant.quantization.weight_only import WeightOnlyScheme
from distquant.sharding.layout import PLAIN_STEPS, Component, Layout
from distquant.sharding.shard import Shard


@register
class GgufScheme(WeightOnlyScheme, PlainDecoder):
    """`QuantizedLinear` with one component: uint8 `[out, in / block * bytes of a block]`."""

    name = "gguf"
    config_class = GgufConfig
    requires: ClassVar[Mapping[str, str]] = {"gguf": "0.10.0"}
    stacks: ClassVar[bool] = False  # a file's types are known by the names of whole parameters, not of experts
    config: GgufConfig

    def kind(self, name: str) -> str:
        """The type of a parameter's tensor; F32 where the file names none."""
        return (self.config.types or {}).get(name, "F32")

    def head(self, name: str) -> int:
        """Rows of a head whose halves are stored interleaved; 0 = rows are in order."""
        return (self.config.interleaved or {}).get(name, 0)

    def validate(self, context: Context) -> list[Problem]:
        problems = super().validate(context)
        if not context.prequantized:
            fault = "'gguf' is a format of files, weights are not quantized to it while they are loaded"
            problems.append(Problem("quantization_config", fault, "Give the path of a .gguf file, or another method"))
        return problems

    def select_modules(self, description: ModelDescription) -> list[str]:
        if self.config.dequantize:
            return []
        chosen = (name for name in description.linears if self.selects(name))
        return [name for name in chosen if BLOCKS[self.kind(f"{name}.weight")][0] > 1]

    def layout(self, name: str, shape: tuple[int, ...], dtype: str) -> Layout:
        rows, (block, nbytes) = self.head(name) or 1, BLOCKS[self.kind(name)]
        return Layout(
            (
                Component(
                    name="",
                    dtype="uint8",
                    block_shape=(rows, block),
                    stored_per_block=(rows, nbytes),
                    preferred_alignments=PLAIN_STEPS,
                ),
            )
        )

    def check_stored(self, name: str, shape: tuple[int, ...], stored: dict[str, tuple[int, ...]]) -> list[Problem]:
        block, nbytes = BLOCKS[self.kind(name)]
        expected = shape if block == 1 else (*shape[:-1], shape[-1] // block * nbytes)
        if stored.get("") == expected:
            return []
        fault = (
            f"the file stores {list(stored[''])} of {self.kind(name)}, a weight of {list(shape)} takes {list(expected)}"
        )
        return [Problem(name, fault, "The file's metadata and tensors do not belong together")]

    # -- parameters that stay unquantized --------------------------------------------------------------------------

    def plain_row_block(self, name: str) -> int:
        return self.head(name) or int(BLOCKS[self.kind(name)][0] > 1)

    def decode(self, name: str, rows: Tensor, out: dict[str, Tensor], ops: Kernels) -> None:
        block, nbytes = BLOCKS[self.kind(name)]
        values = rows
        if block > 1:
            check_values(name, "", self.value_check(name, ""), rows.reshape(-1))
            values = dequantize_gguf(rows, self.kind(name), rows.shape[1] // nbytes * block)
        out[""].copy_(self._in_order(name, values).reshape(-1))

    def value_check(self, name: str, component: str) -> Check | None:
        """Finite scales in every block; a negative one is ordinary, where the largest magnitude is a negative value."""
        kind = self.kind(name)
        return (lambda values: _scale_fault(values, kind)) if kind in HALVES else None

    # -- weights that stay quantized -------------------------------------------------------------------------------

    def pack_prequantized(
        self, shard: Shard, parts: dict[str, Tensor], replicated: frozenset[str]
    ) -> dict[str, Tensor]:
        return {"": self._in_order(shard.name, self.shaped(shard, parts)[""])}

    def _in_order(self, name: str, rows: Tensor) -> Tensor:
        """Rows of whole heads, with the two halves of each in sequence."""
        head = self.head(name)
        if not head:
            return rows
        return rows.view(-1, head // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)

    def dequantize(self, shard: Shard, components: Mapping[str, Tensor], dtype: torch.dtype, ops: Kernels) -> Tensor:
        return dequantize_gguf(components[""], self.kind(shard.name), shard.local_shape[1]).to(dtype)

    def fingerprint_streams(self, shard: Shard, components: Mapping[str, Tensor]) -> Iterable[Stream]:
        """Yields the bytes of every block, eight at a time."""
        kind, (block, nbytes) = self.kind(shard.name), BLOCKS[self.kind(shard.name)]
        rows = shard.local_shape[0]
        blocks = torch.nn.functional.pad(components[""].view(rows, -1, nbytes), (0, -nbytes % 8))
        for word, values in enumerate(blocks.contiguous().view(torch.int64).unbind(2)):
            yield f"{kind} {word}", values, block

    def unsaved(self, model: nn.Module) -> str | None:
        return "transformers reads GGUF from one .gguf file, which save_pretrained does not write"

    def finish_model(self, model: Any) -> None:
        if not self.config.dequantize:
            super().finish_model(model)


def _scale_fault(values: Tensor, kind: str) -> str | None:
    """The fault of a float16 in whole blocks of a type, as flat bytes."""
    words = values if values.storage_offset() % 2 == 0 else values.clone()
    halves = words.view(torch.float16).view(-1, BLOCKS[kind][1] // 2)
    for offset in HALVES[kind]:
        fault = FINITE(halves[:, offset // 2])
        if fault is not None:
            return f"a block of {kind} with the scale {fault}"
    return None
