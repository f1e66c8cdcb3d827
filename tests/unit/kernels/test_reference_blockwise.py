"""Second-level codes of double quantization against bitsandbytes' native CPU kernel, bit for bit."""

from __future__ import annotations

import math
import platform

import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib
from kernel_samples import DTYPES, bits, random, specials

from distquant.kernels import reference
from distquant.kernels.reference import blockwise

native = pytest.mark.skipif(
    isinstance(lib, ErrorHandlerMockBNBNativeLibrary) or platform.machine().lower() not in ("x86_64", "amd64"),
    reason="the definition is that of bitsandbytes' native library on x86-64",
)
CODE = bnb.create_dynamic_map()


def assert_equals_bitsandbytes(values: torch.Tensor, blocksize: int = 256) -> torch.Tensor:
    codes, absmax = reference.quantize_blockwise(values, CODE, blocksize)
    theirs, state = bnb.quantize_blockwise(values.clone(), blocksize=blocksize)
    assert (codes.dtype, absmax.dtype) == (torch.uint8, torch.float32)
    assert torch.equal(state.code, CODE)
    assert torch.equal(bits(absmax), bits(state.absmax))
    assert torch.equal(codes, theirs.view(-1))
    return codes


@native
@pytest.mark.parametrize("count", [1, 7, 255, 256, 257, 1000, 300_001])
@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-38, 1e-3, 1.0, 1e38])
def test_quantize_blockwise(count, scale):
    codes = assert_equals_bitsandbytes(random(count, torch.float32, count, scale))
    assert count < 300_000 or scale < 1e-38 or len(codes.unique()) > 200


@native
@pytest.mark.parametrize("blocksize", [64, 128, 256, 4096])
def test_quantize_blockwise_of_an_absmax_less_its_mean(blocksize):
    absmax = random(100_000, torch.float32, 3).abs()
    assert_equals_bitsandbytes(absmax - absmax.mean(), blocksize)


@native
def test_quantize_blockwise_next_to_every_decision():
    """Both sides of each of the 65535 places where the grid point changes, and of the midpoints of values."""
    between = ((torch.arange(1, 65536, dtype=torch.float64) - 0.5) / 65535 * 2 - 1).float()
    probes = [between, (CODE[1:] + CODE[:-1]) / 2, CODE]
    for direction in (-math.inf, math.inf):
        near = between
        for _ in range(3):
            near = torch.nextafter(near, torch.tensor(direction))
            probes.append(near)
    flat = torch.cat(probes).clamp(-1, 1)
    rows = torch.nn.functional.pad(flat, (0, -len(flat) % 255)).view(-1, 255)
    codes = assert_equals_bitsandbytes(torch.nn.functional.pad(rows, (0, 1), value=1.0).view(-1))
    assert len(codes.unique()) == 249  # the 7 codes next to 0 lie between two grid points


@native
@pytest.mark.parametrize("count", [1, 5, 256, 257, 600])
def test_quantize_blockwise_of_special_values(count):
    for seed in range(20):
        assert_equals_bitsandbytes(specials(count, torch.float32, seed))


@native
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 3e38])
def test_quantize_blockwise_of_one_value_everywhere(value):
    assert_equals_bitsandbytes(torch.full((300,), value))


def test_a_nan_counts_for_nothing_and_zeros_get_code_0():
    values = torch.tensor([math.nan, 0.5, -0.25, 0.0])
    codes, absmax = reference.quantize_blockwise(values, CODE, 256)
    assert absmax.tolist() == [0.5]
    assert codes[0] == 0
    assert CODE[codes[1:].int()].tolist() == [1.0, pytest.approx(-0.5, abs=0.02), pytest.approx(0.0, abs=1e-4)]
    assert reference.quantize_blockwise(torch.zeros(3), CODE, 256)[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_quantize_blockwise_takes_any_dtype_and_shape_and_writes_where_told(dtype):
    values = random(600, DTYPES[dtype], 5).view(20, 30)
    codes, absmax = torch.empty(600, dtype=torch.uint8), torch.empty(3)
    found = reference.quantize_blockwise(values, CODE, 256, codes=codes, absmax=absmax)
    assert [tensor.data_ptr() for tensor in found] == [codes.data_ptr(), absmax.data_ptr()]
    expected = reference.quantize_blockwise(values.float().view(-1), CODE, 256)
    assert torch.equal(codes, expected[0])
    assert torch.equal(absmax, expected[1])
    back = reference.dequantize_blockwise(codes, absmax, CODE, 256)
    assert torch.allclose(back, values.float().view(-1), atol=0.04)


@pytest.mark.parametrize("count", [256, 1000, 1024, 7])
def test_dequantize_blockwise(count):
    source = random(count, torch.float32, 4).abs()
    codes, state = bnb.quantize_blockwise(source, blocksize=256)
    theirs = bnb.dequantize_blockwise(codes, state)
    ours = reference.dequantize_blockwise(codes, state.absmax, state.code, 256)
    assert torch.equal(bits(ours), bits(theirs))
    assert len(ours.unique()) > 4


def test_the_table_of_codes_is_made_once_for_each_tensor_of_values(monkeypatch):
    """A load of 80 layers quantizes 560 weights with the same values."""
    made = []
    monkeypatch.setattr(blockwise, "blockwise_table", lambda code: made.append(1) or reference.blockwise_table(code))
    code, values = CODE.clone(), random(1000, torch.float32, 1)
    first, _ = reference.quantize_blockwise(values, code, 256)
    assert torch.equal(reference.quantize_blockwise(values, code, 256)[0], first)
    assert len(made) == 1
    code.mul_(0.5)  # other values have another table, also in the same memory
    changed, _ = reference.quantize_blockwise(values, code, 256)
    assert len(made) == 2
    assert torch.equal(changed, reference.quantize_blockwise(values, CODE * 0.5, 256)[0])
    assert not torch.equal(changed, first)
