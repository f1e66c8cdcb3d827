"""HQQ in tiles, on any number of threads: the bits of hqq's own quantizer on one thread."""

from __future__ import annotations

import math

import pytest
import torch

from distquant.quantization.algorithms.hqq_optimizer import STEP, TILE, _tiles, quantize_hqq
from distquant.quantization.algorithms.threads import one_thread

Quantizer = pytest.importorskip("hqq.core.quantize").Quantizer

SHAPES = [(64, 24), (48, 200), (352, 120), (700, 1000)]
"""Less than a tile, ragged ends, several tiles."""


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def weight(shape: tuple[int, int], dtype: torch.dtype, scale: float = 0.02) -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1])) * scale
    made[0, :8] = 0
    return made.to(dtype)


def compare(source: torch.Tensor, bits: int, size: int, axis: int, optimize: bool, round_zero: bool) -> None:
    with one_thread():
        expected, meta = Quantizer.quantize(
            source, nbits=bits, group_size=size, axis=axis, optimize=optimize, round_zero=round_zero,
            bitpack=False, device="cpu",
        )  # fmt: skip
    codes = torch.full((source.numel(),), 255, dtype=torch.uint8)
    scale, zero = quantize_hqq(source, bits, size, axis, optimize, round_zero, codes)
    assert torch.equal(codes, expected.reshape(-1).to(torch.uint8))
    assert torch.equal(scale, meta["scale"])
    assert torch.equal(zero, meta["zero"])


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_scales_and_zeros_are_hqqs(shape, axis, optimize, threads):
    size = 8 if math.prod(shape) % 64 else 64
    for bits, dtype, scale in ((4, torch.bfloat16, 0.02), (8, torch.float16, 1.0), (3, torch.float32, 1e-5)):
        compare(weight(shape, dtype, scale), bits, size, axis, optimize, bits == 4)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [1, 2])
def test_few_bits_and_whole_rows_as_groups(bits, axis):
    source = weight((96, 160), torch.bfloat16)
    compare(source, bits, source.shape[axis], axis, True, False)


def test_the_number_of_threads_is_left_as_it_was(threads):
    compare(weight((352, 120), torch.bfloat16), 4, 8, 1, True, True)
    assert torch.get_num_threads() == threads


def test_an_error_in_a_tile_is_raised(monkeypatch, threads):
    def fails(*arguments):
        raise RuntimeError("from a tile")

    monkeypatch.setattr("hqq.core.optimize.optimize_weights_proximal_legacy_step", fails)
    with pytest.raises(RuntimeError, match="from a tile"):
        quantize_hqq(torch.ones(64, 64), 4, 64, 1, True, True, torch.empty(64 * 64, dtype=torch.uint8))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("groups", "size"), [(1, 8), (63, 64), (5000, 64), (130, 4096), (3, TILE * 2)])
def test_tiles_are_all_groups_once(groups, size, axis):
    shape = torch.Size((groups, size) if axis == 1 else (size, groups))
    seen = torch.zeros(shape, dtype=torch.int8)
    for tile in _tiles(shape, axis):
        assert tile[1 - axis].start % STEP == 0
        seen[tile] += 1
    assert bool((seen == 1).all())
