"""FP8 tiles of the reference against transformers' own operation, bit for bit, and against its definition elsewhere."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from kernel_samples import DTYPES, bits, random, specials
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from distquant.kernels import reference

BLOCKS = [(None, None), (1, None), (128, 128), (4, 16), (None, 8), (3, None)]


def upstream(
    weight: torch.Tensor, tile: tuple[int, int], scale_fmt: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    config = SimpleNamespace(weight_block_size=tile, scale_fmt=scale_fmt)
    found = Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"m.weight": weight})
    return found["m.weight"], found["m.weight_scale_inv"]


def e4m3(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("scale", [1e-30, 1e-5, 0.02, 1.0, 3e4, 1e38])
@pytest.mark.parametrize("block", BLOCKS)
def test_quantize_fp8_is_that_of_transformers(block, scale, dtype):
    largest = torch.finfo(DTYPES[dtype]).max
    weight = random(384 * 256, torch.float32, 1, scale).clamp(-largest, largest).to(DTYPES[dtype]).view(384, 256)
    codes, scales = reference.quantize_fp8(weight, block)
    theirs, inverse = upstream(weight, (block[0] or 384, block[1] or 256))
    assert (codes.dtype, scales.dtype, scales.shape) == (torch.float8_e4m3fn, torch.float32, inverse.shape)
    assert torch.equal(bits(scales), bits(inverse))
    assert torch.equal(e4m3(codes), e4m3(theirs))


def test_quantize_fp8_of_every_bfloat16_value_up_to_one():
    positive = torch.arange(0x3F81, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    weight = torch.cat([positive, -positive])[None]
    codes, scales = reference.quantize_fp8(weight, (None, None))
    theirs, inverse = upstream(weight, (1, weight.shape[1]))
    assert torch.equal(e4m3(codes), e4m3(theirs))
    assert torch.equal(scales, inverse)
    assert len(e4m3(codes).unique()) == 2 * 127


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (130, 300), (127, 129), (1, 513), (513, 1)])
def test_ragged_tiles_have_their_own_amax(shape, block, dtype):
    weight = random(math.prod(shape), DTYPES[dtype], 2).view(shape)
    codes, scales = reference.quantize_fp8(weight, block)
    height, width = block[0] or shape[0], block[1] or shape[1]
    assert scales.shape == (-(-shape[0] // height), -(-shape[1] // width))
    back = reference.dequantize_fp8(codes, scales, block)
    for i, row in enumerate(range(0, shape[0], height)):
        for j, column in enumerate(range(0, shape[1], width)):
            here = (slice(row, row + height), slice(column, column + width))
            tile, inverse = upstream(weight[here], tuple(weight[here].shape))
            assert torch.equal(e4m3(codes[here]), e4m3(tile))
            assert torch.equal(scales[i, j], inverse[0, 0])
            assert torch.equal(back[here], codes[here].float() * scales[i, j])
            if height * width < 100:
                return  # one tile shows as much as thousands


def test_quantize_fp8_of_special_values():
    for seed in range(30):
        weight = specials(8 * 16, torch.float32, seed, [0.0, -0.0, 1.0, -1.0, 1e-30, -2.0, math.inf, math.nan])
        codes, scales = reference.quantize_fp8(weight.view(8, 16), (4, 8))
        theirs, inverse = upstream(weight.view(8, 16), (4, 8))
        same = torch.where(theirs.float().isnan(), 0x7F, e4m3(theirs))
        assert torch.equal(bits(scales), bits(inverse))
        assert torch.equal(e4m3(codes), same)


def test_zeros_and_the_sign_of_zero():
    codes, scales = reference.quantize_fp8(torch.tensor([[0.0, -0.0]]), (1, None))
    assert e4m3(codes).tolist() == [[0x00, 0x80]]
    assert scales.tolist() == [[1.0]]


def test_nan_and_infinity():
    weight = torch.tensor([[math.nan, 2.0, -1000.0], [-math.inf, 2.0, -2.0], [-math.nan, 0.0, 0.0]])
    codes, scales = reference.quantize_fp8(weight, (1, None))
    assert scales.flatten().tolist() == [1.0, math.inf, 1.0]
    assert e4m3(codes)[0].tolist() == [0x7F, e4m3(torch.tensor(2.0).to(codes.dtype)).item(), 0xFE]
    assert e4m3(codes)[1].tolist() == [0x7F, 0x00, 0x80]
    assert e4m3(codes)[2].tolist() == [0x7F, 0, 0]


@pytest.mark.parametrize("amax", [1e-45, 1e-40, 1e-38, 1.3e-36])
def test_a_tile_whose_factor_overflows_becomes_zeros_not_nan(amax):
    codes, scales = reference.quantize_fp8(torch.tensor([[amax, 0.0, -amax]]), (1, None))
    assert e4m3(codes).tolist() == [[0x00, 0x00, 0x80]]
    assert scales.item() == 1.0
    assert reference.quantize_fp8(torch.tensor([[1.4e-36, 0.0]]), (1, None))[0].float().tolist() == [[448.0, 0.0]]


@pytest.mark.parametrize("block", [(1, None), (None, None), (64, 64)])
def test_shards_under_a_shared_amax_are_the_shards_of_the_whole(block):
    weight = random(128 * 192, torch.bfloat16, 7).view(128, 192)
    whole, scales = reference.quantize_fp8(weight, block)
    parts = weight.split([64, 128], dim=1)
    if block[1] is not None:
        amax = [reference.block_amax(part, block) for part in parts]
    else:
        shared = torch.stack([reference.block_amax(part, block) for part in parts]).amax(0)
        assert torch.equal(shared, reference.block_amax(weight, block))
        amax = [shared, shared]
    found = [reference.encode_fp8(part, *rest) for part, rest in zip(parts, [(a, block) for a in amax], strict=True)]
    assert torch.equal(e4m3(torch.cat([codes for codes, _ in found], dim=1)), e4m3(whole))
    columns = torch.cat([scale for _, scale in found], dim=1)
    assert torch.equal(columns[:, : scales.shape[1]], scales)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_dequantize_casts_the_float32_product(dtype):
    codes, scales = reference.quantize_fp8(random(40 * 70, torch.float32, 3).view(40, 70), (16, 16))
    found = reference.dequantize_fp8(codes, scales, (16, 16), DTYPES[dtype])
    assert found.dtype is DTYPES[dtype]
    assert torch.equal(found, reference.dequantize_fp8(codes, scales, (16, 16)).to(DTYPES[dtype]))


def test_into_given_outputs():
    weight = random(20 * 40, torch.bfloat16, 4).view(20, 40)
    codes, scale = torch.empty(20, 40, dtype=torch.float8_e4m3fn), torch.empty(3, 5)
    found = reference.quantize_fp8(weight, (8, 8), codes=codes, scale=scale)
    assert [tensor.data_ptr() for tensor in found] == [codes.data_ptr(), scale.data_ptr()]
    expected = reference.quantize_fp8(weight, (8, 8))
    assert torch.equal(e4m3(codes), e4m3(expected[0]))
    assert torch.equal(scale, expected[1])
    with pytest.raises(ValueError, match=r"torch.float32 \[3, 4\]"):
        reference.quantize_fp8(weight, (8, 8), scale=torch.empty(3, 4))


# -- powers of two, and FBGEMM's rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-5, 0.02, 1.0, 3e4, 1e37])
@pytest.mark.parametrize("block", [(1, 32), *BLOCKS])
def test_powers_of_two_are_those_of_transformers(block, scale, dtype):
    largest = torch.finfo(DTYPES[dtype]).max
    weight = random(384 * 256, torch.float32, 1, scale).clamp(-largest, largest).to(DTYPES[dtype]).view(384, 256)
    codes, scales = reference.quantize_fp8_ue8m0(weight, block)
    theirs, inverse = upstream(weight, (block[0] or 384, block[1] or 256), "ue8m0")
    assert (codes.dtype, scales.dtype, scales.shape) == (torch.float8_e4m3fn, torch.float8_e8m0fnu, inverse.shape)
    assert torch.equal(scales.view(torch.uint8), inverse.view(torch.uint8))
    assert torch.equal(e4m3(codes), e4m3(theirs))


def test_powers_of_two_of_every_bfloat16_amax():
    """Up to 2^126: reciprocals of larger ones are subnormal, so inexact that upstream's logarithm falls below."""
    amax = torch.arange(0x7E80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)[:, None]
    scales = reference.quantize_fp8_ue8m0(amax, (1, 32))[1]
    assert torch.equal(scales.view(torch.uint8), upstream(amax, (1, 1), "ue8m0")[1].view(torch.uint8))
    normal = amax[:, 0] > 2.0**-100
    held = amax.double() / scales.to(torch.float64)
    assert held.max() <= 448
    assert (held[normal] > 224).all(), "half the scale would have clamped it"


def test_powers_of_two_of_float32_are_the_smallest_that_do_not_clamp():
    """Just above 448 * 2^k, where a logarithm in float32 may fall on k."""
    amax = torch.nextafter(torch.tensor([448.0 * 2.0**k for k in range(-20, 20)]), torch.tensor(math.inf))[:, None]
    for values in (amax, amax * (1 + 2.0**-20)):
        codes, scales = reference.quantize_fp8_ue8m0(values, (1, 32))
        assert scales.float().log2().flatten().tolist() == list(range(-19, 21))
        assert codes.float().unique().tolist() == [224.0]


def test_powers_of_two_of_special_values():
    weight = torch.tensor([[0.0, -0.0], [math.nan, 1.5], [math.inf, 1.0], [math.nan, 1000.0], [1e-45, -1e-45]])
    codes, scales = reference.quantize_fp8_ue8m0(weight, (1, None))
    assert scales.view(torch.uint8).flatten().tolist() == [127, 127, 255, 127, 1]
    assert e4m3(codes).tolist()[:4] == [[0, 0x80], [0x7F, 0x3C], [0x7F, 0x7F], [0x7F, 0x7E]]


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("scale", [1e-8, 0.02, 1.0, 3e4])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (130, 300), (513, 1)])
def test_rows_follow_the_definition_of_fbgemm(shape, scale, dtype):
    """Divisions of float32 in double precision, rounded once: a quotient of floats is never rounded twice by that."""
    largest = torch.finfo(DTYPES[dtype]).max
    weight = random(math.prod(shape), torch.float32, 3, scale).clamp(-largest, largest).to(DTYPES[dtype]).view(shape)
    codes, scales = reference.quantize_fp8_rows(weight)
    amax = weight.double().abs().amax(1, keepdim=True)
    expected = (amax / 448).float().clamp(min=1 / (448 * 512))
    assert (scales.dtype, scales.shape) == (torch.float32, (shape[0], 1))
    assert torch.equal(scales, expected)
    values = (weight.double() / expected.double()).float().clamp(-448, 448)
    assert torch.equal(e4m3(codes), e4m3(values.to(torch.float8_e4m3fn)))


def test_rows_of_special_values():
    weight = torch.tensor([[0.0, -0.0], [math.nan, 1.5], [-math.inf, 1.0]])
    codes, scales = reference.quantize_fp8_rows(weight)
    assert torch.equal(bits(scales), bits(torch.tensor([[1 / (448 * 512)], [math.nan], [math.inf]])))
    assert e4m3(codes).tolist() == [[0, 0x80], [0x7F, 0x7F], [0x7F, 0]]


def test_new_forms_write_into_given_outputs():
    weight = random(16 * 64, torch.bfloat16, 5).view(16, 64)
    codes, scale, powers = torch.empty(16, 64, dtype=torch.float8_e4m3fn), torch.empty(16, 1), torch.empty(16, 2)
    powers = powers.to(torch.float8_e8m0fnu)
    found = reference.quantize_fp8_rows(weight, codes=codes, scale=scale)
    assert (found[0].data_ptr(), found[1].data_ptr()) == (codes.data_ptr(), scale.data_ptr())
    found = reference.quantize_fp8_ue8m0(weight, (1, 32), codes=codes, scale=powers)
    assert (found[0].data_ptr(), found[1].data_ptr()) == (codes.data_ptr(), powers.data_ptr())
    assert torch.equal(e4m3(codes), e4m3(reference.quantize_fp8_ue8m0(weight, (1, 32))[0]))
