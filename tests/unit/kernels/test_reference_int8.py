"""int8 rows of the reference against bitsandbytes on CPU, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from bitsandbytes import functional as bnb
from kernel_samples import DTYPES, bits, random, specials

from distquant.kernels import reference


def assert_int8_equals_bitsandbytes(weight: torch.Tensor) -> torch.Tensor:
    absmax = reference.row_absmax(weight)
    codes = reference.encode_int8_rows(weight, absmax)
    theirs, stats, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
    assert (codes.dtype, absmax.dtype) == (torch.int8, torch.float32)
    assert torch.equal(bits(absmax), bits(stats))
    assert torch.equal(codes, theirs)
    return codes


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (16, 96), (33, 352), (2, 5000)])
def test_int8_rows(shape, dtype):
    codes = assert_int8_equals_bitsandbytes(random(math.prod(shape), DTYPES[dtype], 9).view(shape))
    assert torch.all(codes.abs().amax(dim=1) == 127)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("scale", [1e-9, 1e-7, 1e-4, 1.0, 1e3, 6e4])
def test_int8_rows_of_any_scale(scale, dtype):
    assert_int8_equals_bitsandbytes(random(8 * 64, DTYPES[dtype], 13, scale).view(8, 64))


@pytest.mark.parametrize("value", [0.0, -0.0, math.inf, math.nan, 6e-8, 65504.0, 1e6])
def test_int8_rows_with_special_values(value):
    weight = random(4 * 32, torch.float32, 17).view(4, 32)
    weight[1] = value
    weight[2, 5] = value
    assert_int8_equals_bitsandbytes(weight)


def test_int8_rounds_after_the_cast_to_float16():
    """1 + 2**-12 is 1 in float16: absmax is that of the cast weight, not of the given one."""
    weight = torch.tensor([[1 + 2**-12, 0.5]])
    assert reference.row_absmax(weight).tolist() == [1.0]
    assert reference.encode_int8_rows(weight, reference.row_absmax(weight)).tolist() == [[127, 64]]


def test_int8_halves_of_a_row_under_the_whole_rows_absmax():
    weight = random(8 * 96, torch.bfloat16, 19).view(8, 96)
    absmax = reference.row_absmax(weight)
    halves = [reference.encode_int8_rows(part, absmax) for part in weight.split([40, 56], dim=1)]
    assert torch.equal(torch.cat(halves, dim=1), reference.encode_int8_rows(weight, absmax))
    reduced = torch.stack([reference.row_absmax(part) for part in weight.split([40, 56], dim=1)]).amax(dim=0)
    assert torch.equal(reduced, absmax)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_int8_in_one_call_is_absmax_and_codes(dtype):
    weight = random(33 * 130, DTYPES[dtype], 21).view(33, 130)
    codes, absmax = reference.quantize_int8_rows(weight)
    assert torch.equal(absmax, reference.row_absmax(weight))
    assert torch.equal(codes, reference.encode_int8_rows(weight, absmax))


def test_int8_into_given_outputs():
    weight = random(8 * 96, torch.bfloat16, 22).view(8, 96)
    codes, absmax = torch.empty(8, 96, dtype=torch.int8), torch.empty(8)
    found = reference.quantize_int8_rows(weight, codes=codes, absmax=absmax)
    assert [tensor.data_ptr() for tensor in found] == [codes.data_ptr(), absmax.data_ptr()]
    expected = reference.quantize_int8_rows(weight)
    assert torch.equal(codes, expected[0])
    assert torch.equal(absmax, expected[1])
    with pytest.raises(ValueError, match=r"torch.int8 \[8, 95\].*torch.int8 \[8, 96\]"):
        reference.quantize_int8_rows(weight, codes=torch.empty(8, 95, dtype=torch.int8))
    with pytest.raises(ValueError, match="not contiguous"):
        reference.quantize_int8_rows(weight, codes=torch.empty(96, 8, dtype=torch.int8).T)


def test_int8_of_what_has_no_product_is_zero():
    weight = random(6 * 32, torch.float32, 23).view(6, 32)
    weight[0] = 0.0
    weight[1, 3] = math.nan
    weight[2, 3] = -math.inf
    codes, absmax = reference.quantize_int8_rows(weight)
    assert not codes[:3].any()
    assert codes[3:].any(dim=1).all()
    assert absmax[0] == 0
    assert absmax[1].isnan()
    assert absmax[2] == math.inf


@pytest.mark.parametrize("seed", range(5))
def test_int8_of_special_values(seed):
    assert_int8_equals_bitsandbytes(specials(8 * 24, torch.float32, seed).view(8, 24))
