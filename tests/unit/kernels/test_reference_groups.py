"""Groups of integers against compressed-tensors, bit for bit, where that is installed."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_samples import DTYPES, bits, random, specials

from distquant.kernels import reference

KINDS = [(4, True), (4, False), (8, True), (8, False)]


def library(weight: torch.Tensor, group_size: int, bit_count: int, symmetric: bool):
    """Codes, scale and zero point as compressed-tensors makes them."""
    reason = "compressed-tensors is not installed: the library that defines these codes is not compared with"
    package = pytest.importorskip("compressed_tensors", reason=reason)
    quantization = package.quantization
    args = quantization.QuantizationArgs(
        num_bits=bit_count, type="int", strategy="group", group_size=group_size, symmetric=symmetric
    )
    grouped = weight.unflatten(1, (-1, group_size))
    scale, zero = quantization.utils.calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    codes = quantization.lifecycle.forward.quantize(weight, scale, zero, args, dtype=torch.int8)
    return codes, scale, zero, args


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize(("bit_count", "symmetric"), KINDS)
@pytest.mark.parametrize(("shape", "group_size"), [((33, 256), 128), ((7, 96), 32), ((5, 300), 60), ((1, 16), 16)])
@pytest.mark.parametrize("scale", [1e-7, 0.02, 1.0, 1e3])
def test_quantize_groups_is_that_of_compressed_tensors(shape, group_size, bit_count, symmetric, dtype, scale):
    weight = random(math.prod(shape), DTYPES[dtype], 5, scale).view(shape)
    theirs, their_scale, their_zero, _ = library(weight, group_size, bit_count, symmetric)
    codes, scales, zero = reference.quantize_groups(weight, group_size, bit_count, symmetric)
    assert (codes.dtype, scales.dtype) == (torch.int8, DTYPES[dtype])
    assert torch.equal(scales, their_scale)
    assert torch.equal(codes, theirs)
    if symmetric:
        assert zero is None
        assert not their_zero.any()
    else:
        assert zero.dtype is torch.int8
        assert torch.equal(zero, their_zero)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize(("bit_count", "symmetric"), KINDS)
def test_quantize_groups_of_one_sided_and_zero_groups(bit_count, symmetric, dtype):
    weight = random(6 * 64, DTYPES[dtype], 6).view(6, 64)
    weight[0], weight[1], weight[2], weight[3] = weight[0].abs(), -weight[1].abs(), 0.0, 1.5
    weight[4, ::2] = -0.0
    theirs, their_scale, their_zero, _ = library(weight, 32, bit_count, symmetric)
    codes, scales, zero = reference.quantize_groups(weight, 32, bit_count, symmetric)
    assert torch.equal(scales, their_scale)
    assert torch.equal(codes, theirs)
    assert symmetric or torch.equal(zero, their_zero)
    assert torch.equal(scales[2], torch.full_like(scales[2], torch.finfo(DTYPES[dtype]).eps))
    assert not codes[2].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("bit_count", "symmetric"), KINDS)
def test_dequantize_groups_is_that_of_compressed_tensors(bit_count, symmetric, dtype):
    weight = random(8 * 96, DTYPES[dtype], 8).view(8, 96)
    codes, scales, their_zero, args = library(weight, 32, bit_count, symmetric)
    forward = pytest.importorskip("compressed_tensors").quantization.lifecycle.forward
    theirs = forward.dequantize(codes, scales, their_zero, args)
    found = reference.dequantize_groups(codes, scales, None if symmetric else their_zero, 32, DTYPES[dtype])
    assert theirs.dtype is DTYPES[dtype]
    assert torch.equal(found, theirs)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize(("bit_count", "symmetric"), KINDS)
def test_a_ragged_last_group_is_a_group_of_its_own(bit_count, symmetric, dtype):
    weight = random(9 * 150, DTYPES[dtype], 9).view(9, 150)
    codes, scales, zero = reference.quantize_groups(weight, 64, bit_count, symmetric)
    assert scales.shape == (9, 3)
    for part, at in ((weight[:, :128], slice(0, 2)), (weight[:, 128:], slice(2, 3))):
        columns = slice(at.start * 64, at.start * 64 + part.shape[1])
        alone = reference.quantize_groups(part, min(64, part.shape[1]), bit_count, symmetric)
        assert torch.equal(codes[:, columns], alone[0])
        assert torch.equal(scales[:, at], alone[1])
        assert symmetric or torch.equal(zero[:, at], alone[2])
    back = reference.dequantize_groups(codes, scales, zero, 64)
    assert back.dtype is torch.float32
    # Half a step, and what the dtype rounds; the zero point may itself be half a step off at the ends.
    step = scales.float().repeat_interleave(64, dim=1)[:, :150]
    assert torch.all((back - weight.float()).abs() <= 1.1 * step)
    assert len(codes.unique()) >= (15 if bit_count == 4 else 200)


@pytest.mark.parametrize(("bit_count", "symmetric"), KINDS)
def test_where_nothing_is_defined_there_are_zeros(bit_count, symmetric):
    weight = random(4 * 32, torch.float32, 10).view(4, 32)
    weight[0, 3], weight[1, 3], weight[2, 3] = math.nan, math.inf, -math.inf
    codes, scales, zero = reference.quantize_groups(weight, 32, bit_count, symmetric)
    assert scales[0].isnan()
    assert scales[1:3].flatten().tolist() == [math.inf, math.inf]
    assert not codes[0].any()
    assert codes[1, 3] == codes[2, 3] == 0
    if not symmetric:
        assert zero.flatten().tolist()[:3] == [0, -(2 ** (bit_count - 1)), 0]
        assert codes[1, 0] == -(2 ** (bit_count - 1))


@pytest.mark.parametrize(("bit_count", "symmetric"), KINDS)
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_special_values_stay_in_their_group(bit_count, symmetric, dtype):
    for seed in range(5):
        weight = specials(6 * 8, DTYPES[dtype], seed).view(6, 8)
        codes, scales, zero = reference.quantize_groups(weight, 4, bit_count, symmetric)
        again = [reference.quantize_groups(row[None], 4, bit_count, symmetric) for row in weight]
        assert torch.equal(codes, torch.cat([row[0] for row in again]))
        assert torch.equal(bits(scales.float()), bits(torch.cat([row[1] for row in again]).float()))
        assert symmetric or torch.equal(zero, torch.cat([row[2] for row in again]))
        top = 2 ** (bit_count - 1)
        assert -top <= codes.min().item() <= codes.max().item() < top


def test_into_given_outputs_and_refusals():
    weight = random(6 * 40, torch.bfloat16, 11).view(6, 40)
    codes = torch.empty(6, 40, dtype=torch.int8)
    scale, zero = torch.empty(6, 3, dtype=torch.bfloat16), torch.empty(6, 3, dtype=torch.int8)
    found = reference.quantize_groups(weight, 16, 4, False, codes=codes, scale=scale, zero=zero)
    assert [tensor.data_ptr() for tensor in found] == [codes.data_ptr(), scale.data_ptr(), zero.data_ptr()]
    for ours, expected in zip(found, reference.quantize_groups(weight, 16, 4, False), strict=True):
        assert torch.equal(ours, expected)
    with pytest.raises(ValueError, match="groups of 3 bits: only 4 and 8"):
        reference.quantize_groups(weight, 16, 3, True)
    with pytest.raises(ValueError, match=r"torch.float32.*torch.bfloat16"):
        reference.quantize_groups(weight, 16, 4, True, scale=torch.empty(6, 3))
