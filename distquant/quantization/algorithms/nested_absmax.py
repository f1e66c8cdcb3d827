"""absmax of bitsandbytes' 4-bit weights: those that a shard holds, and how double quantization stores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from distquant.kernels import reference
from distquant.kernels.protocol import Kernels
from distquant.quantization.algorithms.threads import on_one_thread
from distquant.sharding.shard import Shard

BLOCK = 64
"""Elements per absmax; what `transformers` always uses."""
FINE_BLOCK = 32
"""Smallest block that bitsandbytes' kernels take."""
SECOND = 256
"""absmax per second-level block."""

Segments = list[tuple[int, int]]


@dataclass(slots=True)
class Statistics:
    """absmax of one weight or shard; `codes` and the rest are None unless nested.

    Attributes:
        absmax: float32 `[blocks]`, the values that the kernel uses; None where only the nested form is kept.
        codes: uint8 `[blocks]`, second-level codes.
        second: float32 `[ceil(blocks / 256)]`, their absmax.
        offset: float32 scalar, mean of all absmax of the whole weight.
        values: float32 `[256]`, value of each second-level code; None = `dynamic_map`.
    """

    absmax: Tensor | None
    codes: Tensor | None = None
    second: Tensor | None = None
    offset: Tensor | None = None
    values: Tensor | None = None

    @classmethod
    def of(cls, components: Mapping[str, Tensor]) -> Statistics:
        """From the stored components of a weight, see `components`."""
        if "nested_absmax" not in components:
            return cls(components["absmax"])
        codes, second, offset = (components[name] for name in ("absmax", "nested_absmax", "nested_offset"))
        return cls(None, codes, second, offset, components.get("nested_quant_map"))

    def components(self) -> dict[str, Tensor]:
        """Stored components, under the names of bitsandbytes' checkpoints."""
        if self.absmax is not None:
            return {"absmax": self.absmax}
        assert self.codes is not None and self.second is not None and self.offset is not None
        components = {"absmax": self.codes, "nested_absmax": self.second, "nested_offset": self.offset}
        return components if self.values is None else {**components, "nested_quant_map": self.values}

    def effective(self, ops: Kernels = reference) -> Tensor:
        """float32 `[blocks]`, as bitsandbytes computes them at use: `values[codes] * second + offset`."""
        if self.absmax is not None:
            return self.absmax
        assert self.codes is not None and self.second is not None and self.offset is not None
        values = dynamic_map(self.codes.device) if self.values is None else self.values
        return ops.dequantize_blockwise(self.codes, self.second, values, SECOND).add_(self.offset)


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """float32 `[256]`: bitsandbytes' values of second-level codes."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map().to(device)


def quantize_absmax(absmax: Tensor, shard: Shard, ops: Kernels, device: torch.device) -> Statistics:
    """A shard's statistics after the second level of double quantization, from all absmax of the weight.

    Of a shard of whole rows only the second-level blocks that it touches are quantized.

    Args:
        absmax: float32 `[blocks of the weight]`, on the device or in host memory.
        shard: the shard.
        ops: kernels.
        device: of the result.
    """
    # The mean of all absmax, on the CPU and on one thread: its last bit depends on the order of the sum.
    mean = on_one_thread(lambda: absmax.cpu().mean())
    # Written by a kernel: a copy of one number would make the host wait for the device.
    offset = mean if device.type == "cpu" else torch.full((), mean.item(), dtype=torch.float32, device=device)
    code_values = dynamic_map(device)

    def nested(first: int, last: int) -> tuple[Tensor, Tensor]:
        values = absmax[first:last].to(device, non_blocking=True)
        return ops.quantize_blockwise(values - offset, code_values, SECOND)

    if shard.shard_dim != 0:
        codes, second = nested(0, len(absmax))
        return local_statistics(Statistics(None, codes, second, offset), shard, ops)
    segments = block_segments(shard)
    runs = [(a // SECOND * SECOND, min(-(-b // SECOND) * SECOND, len(absmax))) for a, b in segments]
    parts = [nested(first, last) for first, last in runs]
    if keeps_nesting(shard):
        kept = [codes[: b - a] for (a, b), (codes, _) in zip(segments, parts, strict=True)]
        return Statistics(None, _joined(kept), _joined([second for _, second in parts]), offset)
    # The shard does not begin with a second-level block: it keeps the values themselves, as float32.
    values = []
    for (a, b), (first, _), (codes, second) in zip(segments, runs, parts, strict=True):
        values.append(Statistics(None, codes, second, offset).effective(ops)[a - first : b - first])
    return Statistics(_joined(values))


def _joined(runs: list[Tensor]) -> Tensor:
    """Runs one after the other; a single one that fills its memory as it is."""
    alone = len(runs) == 1 and runs[0].untyped_storage().nbytes() == runs[0].nbytes
    return runs[0] if alone else torch.cat(runs)


def local_block(shard: Shard) -> int:
    """Block size that this shard stores: 64, or 32 where its edges or the row are not multiples of 64."""
    if shard.shard_dim != 1:
        return BLOCK
    edges = {edge for segment in shard.columns for edge in segment} | {shard.shape[1]}
    return BLOCK if all(edge % BLOCK == 0 for edge in edges) else FINE_BLOCK


def partition_crosses_blocks(shard: Shard) -> bool:
    """Returns True if any rank's shard may hold part of a block of 64; the same answer on every rank."""
    return shard.shard_dim == 1 and not (
        shard.shape[1] % BLOCK == 0 and shard.partition is not None and shard.partition.legal(BLOCK)
    )


def block_segments(shard: Shard) -> Segments:
    """Flat blocks of 64 that a shard of whole rows holds, in local order."""
    columns = shard.shape[1]
    return [(a * columns // BLOCK, -(-b * columns // BLOCK)) for a, b in shard.rows]


def keeps_nesting(shard: Shard) -> bool:
    """Returns True if the shard's absmax are whole runs of 256 of the weight's, so that their codes can be sliced."""
    if shard.shard_dim is None:
        return True
    if shard.shard_dim == 1:
        return False
    segments = block_segments(shard)
    aligned = all(a % SECOND == 0 for a, _ in segments)
    return aligned and all((b - a) % SECOND == 0 for a, b in segments[:-1])


def block_index(shard: Shard, first: int, last: int, device: Any) -> Tensor:
    """int64 `[(last - first) * columns / b]`: flat block of 64 under each local block `b` of rows `[first, last)`."""
    block, columns = local_block(shard), shard.shape[1]
    starts = torch.cat([torch.arange(a, b, block, device=device) for a, b in shard.columns])
    rows = torch.arange(first, last, device=device).view(-1, 1) * columns
    return ((rows + starts) // BLOCK).view(-1)


def local_statistics(weight: Statistics, shard: Shard, ops: Kernels = reference) -> Statistics:
    """A shard's statistics from the weight's; nested where the shard keeps nesting."""
    if shard.shard_dim is None:
        return weight
    if shard.shard_dim == 0 and weight.codes is not None and keeps_nesting(shard):
        assert weight.second is not None
        runs = block_segments(shard)
        codes = torch.cat([weight.codes[a:b] for a, b in runs])
        second = torch.cat([weight.second[a // SECOND : -(-b // SECOND)] for a, b in runs])
        return Statistics(None, codes, second, weight.offset, weight.values)
    absmax = weight.effective(ops)
    if shard.shard_dim == 0:
        return Statistics(torch.cat([absmax[a:b] for a, b in block_segments(shard)]))
    if not partition_crosses_blocks(shard):
        wide = absmax.view(shard.shape[0], -1)
        return Statistics(torch.cat([wide[:, a // BLOCK : b // BLOCK] for a, b in shard.columns], dim=1).view(-1))
    return Statistics(absmax[block_index(shard, 0, shard.shape[0], absmax.device)])
