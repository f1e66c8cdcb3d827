"""HQQ's quantization of one weight, a tile at a time: on a CPU tiles on all threads, on a device one after the other.

The definition is `Quantizer.quantize` of hqq 0.2.8 (`hqq/core/quantize.py`) with its default optimizer
(`optimize_weights_proximal_legacy`, `hqq/core/optimize.py`) where torch has one thread; on several, torch's results
have other bits. Each round moves every group's zero point, by hqq's own function, and the rounds end when the mean
error of the whole weight no longer falls. Groups are independent within a round, so it is made of tiles that stay in
the cache, each by one thread. Only the errors are kept for the whole weight, because their mean is rounded as the sum
of all. hqq makes every intermediate result as large as the weight, and allocates it each time: most of its time goes
there.

Devices have the same definition, in float32 (hqq itself takes float16 for the iteration on CUDA), with their own power
and mean. Where these round differently from a CPU's, a few codes and zero points differ from those made on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from distquant.kernels.reference.tiles import DEVICE_TILE
from distquant.quantization.algorithms.threads import one_thread, set_own_threads

TILE = 1 << 17
"""Elements of a tile on a CPU, about."""

STEP = 64
"""Tiles begin at multiples of this many groups: torch computes what fills no vector in another way, which must be the
same elements as in the whole weight."""

Tile = tuple[slice, slice]
Each = Callable[[Callable[[Tile], None]], None]
"""Calls a function with every tile."""

SHRINKS, POWER, ROUNDS = 10.0, 0.7, 20
"""hqq's `beta`, `lp_norm` and `iters`."""


def quantize_hqq(
    weight: Tensor, bits: int, group_size: int, axis: int, optimize: bool, round_zero: bool, codes: Tensor
) -> tuple[Tensor, Tensor]:
    """Scales and zeros of the groups, float32 `[groups, 1]` (axis 1) or `[1, groups]` (axis 0); fills the codes.

    Args:
        weight: float of any shape.
        bits: of a code.
        group_size: elements of a group, which divide the weight's.
        axis: 1 = groups along the rows, 0 = groups that stride them.
        optimize: True if zero points are moved.
        round_zero: True if they begin as integers.
        codes: uint8 on the weight's device, as many as the weight has elements, in its order.
    """
    groups = (-1, group_size) if axis == 1 else (group_size, -1)
    with _tiles_on(weight.device) as (size, run):
        values, grouped_codes = weight.float().reshape(groups), codes.view(weight.numel()).view(groups)
        each = partial(run, list(_tiles(values.shape, axis, size)))
        low, high = values.amin(axis, keepdim=True), values.amax(axis, keepdim=True)
        top = round(2**bits - 1)
        scale = torch.where((high - low).abs() <= 1e-4, 1.0, top / (high - low)).clamp_(max=2e4)
        zero = -low * scale
        if round_zero:
            zero.round_()
        if optimize:
            zero = _moved(values, scale, zero, top, axis, each)

        def encode(tile: Tile) -> None:
            scaled = values[tile] * _of(scale, tile, axis)
            grouped_codes[tile] = scaled.add_(_of(zero, tile, axis)).round_().clamp_(0, top)

        each(encode)
        return 1.0 / scale, zero


@contextmanager
def _tiles_on(device: torch.device) -> Iterator[tuple[int, Callable[[list[Tile], Callable[[Tile], None]], None]]]:
    """The elements of a tile on `device`, and what calls a function with every tile there."""

    def in_turn(tiles: list[Tile], work: Callable[[Tile], None]) -> None:
        for tile in tiles:
            work(tile)

    if device.type != "cpu":
        yield DEVICE_TILE, in_turn
        return

    def on_threads(tiles: list[Tile], work: Callable[[Tile], None]) -> None:
        for _ in pool.map(work, tiles):
            pass

    threads = torch.get_num_threads()
    with one_thread(), ThreadPoolExecutor(threads, initializer=set_own_threads, initargs=(1,)) as pool:
        yield TILE, on_threads


def _moved(values: Tensor, scale: Tensor, zero: Tensor, top: int, axis: int, each: Each) -> Tensor:
    """Zero points after the last round."""
    from hqq.core.optimize import optimize_weights_proximal_legacy_step as step

    errors, best = torch.empty_like(values), torch.tensor(torch.inf, dtype=values.dtype, device=values.device)
    before, after = zero, torch.empty_like(zero)

    def move(tile: Tile) -> None:
        part, scales, zeros = values[tile].contiguous(), _of(scale, tile, axis), _of(before, tile, axis)
        dequantized, _, moved, _ = step(part, scales, zeros, [0, top], SHRINKS, POWER, axis)
        _of(after, tile, axis).copy_(moved)
        errors[tile] = (part - dequantized).abs_()

    for _ in range(ROUNDS):
        each(move)
        before, after = after, torch.empty_like(zero)
        error = errors.mean()  # over the whole weight, on a CPU on this one thread
        if not error < best:
            break
        best = error
    return before


def _tiles(shape: torch.Size, axis: int, elements: int = TILE) -> Iterator[Tile]:
    """Yields runs of whole groups, of about so many elements."""
    groups, size = shape[1 - axis], shape[axis]
    run = max(elements // max(size, 1) // STEP, 1) * STEP
    for first in range(0, groups, run):
        part = slice(first, min(first + run, groups))
        yield (part, slice(None)) if axis == 1 else (slice(None), part)


def _of(values: Tensor, tile: Tile, axis: int) -> Tensor:
    """The values of a tile's groups."""
    return values[tile[0]] if axis == 1 else values[:, tile[1]]
