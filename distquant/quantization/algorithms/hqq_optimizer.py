"""HQQ's quantization of one weight, a tile at a time, tiles on all threads.

The definition is `Quantizer.quantize` of hqq 0.2.8 (`hqq/core/quantize.py`) with its default optimizer
(`optimize_weights_proximal_legacy`, `hqq/core/optimize.py`) where torch has one thread; on several, torch's results
have other bits. Each round moves every group's zero point, by hqq's own function, and the rounds end when the mean
error of the whole weight no longer falls. Groups do not see each other within a round, so it is made of tiles that
stay in the cache, each by one thread; only the errors are kept whole, because their mean is rounded as the sum of
all. hqq makes every intermediate result as large as the weight, and asks the machine for its memory each time: most
of its time goes there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from distquant.quantization.algorithms.threads import one_thread, set_own_threads

TILE = 1 << 17
"""Elements of a tile, about."""

STEP = 64
"""Tiles begin at multiples of this many groups: torch computes what fills no vector in another way, which must be the
same elements as in the whole weight."""

Tile = tuple[slice, slice]

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
        axis: 1 = a group lies along the rows, 0 = it strides them.
        optimize: whether zero points are moved.
        round_zero: whether they begin as integers.
        codes: uint8, as many as the weight has elements, in its order.
    """
    threads = torch.get_num_threads()
    groups = (-1, group_size) if axis == 1 else (group_size, -1)
    with one_thread(), ThreadPoolExecutor(threads, initializer=set_own_threads, initargs=(1,)) as pool:
        whole, found = weight.float().reshape(groups), codes.view(weight.numel()).view(groups)
        tiles = list(_tiles(whole.shape, axis))
        low, high = whole.amin(axis, keepdim=True), whole.amax(axis, keepdim=True)
        top = round(2**bits - 1)
        scale = torch.where((high - low).abs() <= 1e-4, 1.0, top / (high - low)).clamp_(max=2e4)
        zero = -low * scale
        if round_zero:
            zero.round_()
        if optimize:
            zero = _moved(whole, scale, zero, top, axis, partial(_each, pool, tiles))

        def encode(tile: Tile) -> None:
            dequant_matmul = whole[tile] * _of(scale, tile, axis)
            found[tile] = dequant_matmul.add_(_of(zero, tile, axis)).round_().clamp_(0, top)

        _each(pool, tiles, encode)
        return 1.0 / scale, zero


def _each(pool: ThreadPoolExecutor, tiles: Iterable[Tile], work: Callable[[Tile], None]) -> None:
    for _ in pool.map(work, tiles):
        pass


def _moved(
    whole: Tensor, scale: Tensor, zero: Tensor, top: int, axis: int, each: Callable[[Callable[[Tile], None]], None]
) -> Tensor:
    """Zero points after the last round; `each` calls a function with every tile."""
    from hqq.core.optimize import optimize_weights_proximal_legacy_step as step

    errors, best = torch.empty_like(whole), torch.tensor(torch.inf, dtype=whole.dtype)
    before, after = zero, torch.empty_like(zero)

    def move(tile: Tile) -> None:
        values = whole[tile].contiguous()
        back, _, at, _ = step(values, _of(scale, tile, axis), _of(before, tile, axis), [0, top], SHRINKS, POWER, axis)
        _of(after, tile, axis).copy_(at)
        errors[tile] = (values - back).abs_()

    for _ in range(ROUNDS):
        each(move)
        before, after = after, torch.empty_like(zero)
        error = errors.mean()
        if not error < best:
            break
        best = error
    return before


def _tiles(shape: torch.Size, axis: int) -> Iterator[Tile]:
    """Runs of whole groups."""
    groups, size = shape[1 - axis], shape[axis]
    run = max(TILE // max(size, 1) // STEP, 1) * STEP
    for first in range(0, groups, run):
        part = slice(first, min(first + run, groups))
        yield (part, slice(None)) if axis == 1 else (slice(None), part)


def _of(values: Tensor, tile: Tile, axis: int) -> Tensor:
    """The values of a tile's groups."""
    return values[tile[0]] if axis == 1 else values[:, tile[1]]
