"""MXFP4 of the reference against transformers, torchao and the definition in numpy's float64, bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import DTYPES, random, specials
from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors

from distquant.kernels import reference

VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
MIDDLE = (VALUES[1:] + VALUES[:-1]) / 2
BROKEN = (255, [7] * 32)
"""Scale and codes of a run with a NaN or an infinity."""


def unpacked(codes: torch.Tensor) -> np.ndarray:
    """`[..., 2 n]` codes of `[..., n]` bytes, the low nibble first."""
    found = codes.numpy()
    return np.stack((found & 15, found >> 4), axis=-1).reshape(*found.shape[:-1], -1)


def defined(run: np.ndarray) -> tuple[int, list[int]]:
    """Scale and codes of 32 numbers: every float32 and every quotient here is exact in float64 or far from a tie."""
    if not np.isfinite(run).all():
        return BROKEN
    amax = float(np.abs(run).max())
    # frexp: amax / 6 = m * 2^e with m in [0.5, 1), so 2^(e - 1) where m is 0.5, else 2^e is the power of two above.
    mantissa, exponent = math.frexp(amax / 6)
    byte = 0 if np.float32(amax / 6) == 0 else max(127 + exponent - (mantissa == 0.5), 1)
    size = np.abs(run) * 2.0 ** (127 - byte)
    distance = np.abs(size[:, None] - VALUES)
    nearest = []
    for row in distance:
        equal = np.flatnonzero(row == row.min()).tolist()
        nearest.append(next(code for code in equal if len(equal) == 1 or code % 2 == 0))
    return byte, [code | (8 if sign else 0) for code, sign in zip(nearest, np.signbit(run), strict=True)]


def same_as_defined(weight: torch.Tensor) -> None:
    codes, scale = reference.quantize_mxfp4(weight)
    assert (codes.dtype, scale.dtype) == (torch.uint8, torch.uint8)
    assert (codes.shape, scale.shape) == (
        (len(weight), weight.shape[1] // 2),
        (len(weight), weight.shape[1] // 32),
    )
    runs = weight.double().numpy().reshape(-1, 32)
    for run, byte, own in zip(runs, scale.view(-1).tolist(), unpacked(codes).reshape(-1, 32), strict=True):
        assert (byte, own.tolist()) == defined(run), run


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("scale", [1e-45, 1e-43, 1e-40, 1e-38, 7e-38, 1e-30, 6e-8, 0.02, 1.0, 3e4, 1e30, 1e38])
def test_quantize_mxfp4_is_the_definition(scale, dtype):
    largest = torch.finfo(DTYPES[dtype]).max
    same_as_defined(random(8 * 64, torch.float32, 1, scale).clamp(-largest, largest).to(DTYPES[dtype]).view(8, 64))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_special_values_stay_in_their_run(dtype):
    for seed in range(10):
        weight = random(8 * 96, DTYPES[dtype], seed)
        weight[:: 40 + seed] = specials(len(weight[:: 40 + seed]), DTYPES[dtype], seed)
        same_as_defined(weight.view(8, 96))
        same_as_defined(specials(64, DTYPES[dtype], seed, [0.0, -0.0, 1.0, -2.0, 1e-45, 6e-8]).view(1, 64))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.floats(width=32), min_size=32, max_size=32))
def test_any_run_is_the_definition(run):
    same_as_defined(torch.tensor(run, dtype=torch.float32).view(1, 32))


@pytest.mark.parametrize("power", [-100, -30, 0, 40, 125])
def test_ties_go_to_the_even_code_and_neighbours_to_the_nearer(power):
    middle = torch.tensor(MIDDLE, dtype=torch.float32)
    beside = [torch.nextafter(middle, torch.tensor(way)) for way in (0.0, 9.0)]
    for sign in (1.0, -1.0):
        for row, expected in zip((middle, *beside), ([0, 2, 2, 4, 4, 6, 6], range(7), range(1, 8)), strict=True):
            run = torch.cat([row, torch.tensor([6.0]), torch.zeros(24)]) * sign
            codes, scale = reference.quantize_mxfp4((run * 2.0**power).view(1, 32))
            assert scale.item() == 127 + power
            assert [code & 7 for code in unpacked(codes)[0, :7]] == list(expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("scale", [1e-30, 0.02, 1.0, 3e4, 1e30])
def test_quantize_mxfp4_is_that_of_torchao(scale, dtype):
    reason = "torchao is not installed: its MXFP4 is not compared with"
    theirs = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason=reason)
    weight = random(96 * 256, DTYPES[dtype], 2, scale).view(96, 256)
    their_scale, their_codes = theirs.to_mx(weight, torch.float4_e2m1fn_x2, 32, theirs.ScaleCalculationMode.RCEIL)
    codes, scales = reference.quantize_mxfp4(weight)
    assert torch.equal(codes, their_codes.view(torch.uint8))
    assert torch.equal(scales, their_scale.view(torch.uint8))
    assert len(np.unique(unpacked(codes))) == 16


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_code_under_every_scale_is_that_of_transformers(dtype):
    """But for scale 255, which the specification calls NaN."""
    pairs = torch.arange(16, dtype=torch.uint8)
    codes = (pairs | (pairs.flip(0) << 4)).repeat(256, 1)
    scale = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(256, 1)
    found = reference.dequantize_mxfp4(codes, scale, DTYPES[dtype])
    theirs = convert_moe_packed_tensors(codes.view(1, 256, 1, 16), scale.view(1, 256, 1), dtype=DTYPES[dtype])
    integer = torch.int32 if dtype == "float32" else torch.int16
    assert found.dtype is DTYPES[dtype]
    assert torch.equal(found[:255].view(integer), theirs[0].T.contiguous()[:255].view(integer))
    assert found[255].isnan().all()
    assert found[127, ::2].tolist() == FP4_VALUES


def test_dequantizing_gives_back_what_is_representable():
    power = torch.exp2(torch.randint(-126, 125, (64, 3, 1), generator=torch.Generator().manual_seed(3)).float())
    run = torch.tensor([*FP4_VALUES, *FP4_VALUES])
    weight = (power * run[torch.randperm(32, generator=torch.Generator().manual_seed(4))]).view(64, 96)
    codes, scale = reference.quantize_mxfp4(weight)
    assert torch.equal(reference.dequantize_mxfp4(codes, scale).view(torch.int32), weight.view(torch.int32))


def test_rows_of_many_columns_are_worked_on_in_parts():
    """More elements than are worked on at a time."""
    weight = random(40 * 16384, torch.bfloat16, 5).view(40, 16384)
    codes, scale = reference.quantize_mxfp4(weight)
    back = reference.dequantize_mxfp4(codes, scale)
    for row in (0, 17, 39):
        own = reference.quantize_mxfp4(weight[row : row + 1])
        assert torch.equal(codes[row], own[0][0]) and torch.equal(scale[row], own[1][0])
        assert torch.equal(back[row], reference.dequantize_mxfp4(*own)[0])


def test_into_given_outputs_and_refusals():
    weight = random(6 * 64, torch.bfloat16, 6).view(6, 64)
    codes, scale = torch.empty(6 * 32, dtype=torch.uint8), torch.empty(6, 2, dtype=torch.uint8)
    found = reference.quantize_mxfp4(weight, codes=codes, scale=scale)
    assert [tensor.data_ptr() for tensor in found] == [codes.data_ptr(), scale.data_ptr()]
    for ours, expected in zip(found, reference.quantize_mxfp4(weight), strict=True):
        assert torch.equal(ours, expected)
    with pytest.raises(ValueError, match="rows have 48 columns, not a multiple of 32"):
        reference.quantize_mxfp4(weight[:, :48])
    with pytest.raises(ValueError, match="rows have 48 columns"):
        reference.dequantize_mxfp4(codes.view(6, 32)[:, :24], scale)
    with pytest.raises(ValueError, match=r"torch.float32.*torch.uint8"):
        reference.quantize_mxfp4(weight, scale=torch.empty(6, 2))
