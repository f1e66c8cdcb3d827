"""4-bit codes against bitsandbytes on CPU, bit for bit; against the flat definition where that kernel is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import DTYPES, bits, random

from distquant.kernels import reference

PROPERTY = settings(deadline=None, derandomize=True, max_examples=150)

BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]


def assert_equals_bitsandbytes(weight: torch.Tensor, blocksize: int, quant_type: str) -> torch.Tensor:
    packed, absmax = reference.quantize_4bit(weight, blocksize, quant_type)
    theirs, state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type)
    assert (packed.dtype, absmax.dtype) == (torch.uint8, torch.float32)
    assert packed.shape == (math.ceil(weight.numel() / 2),)
    assert absmax.shape == (math.ceil(weight.numel() / blocksize),)
    assert torch.equal(bits(absmax), bits(state.absmax))
    assert torch.equal(packed, theirs.view(-1))
    return packed


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_code_tables_are_bitsandbytes(quant_type):
    ours, theirs = reference.code_values(quant_type), bnb.get_4bit_type(quant_type, device="cpu")
    assert ours.dtype is torch.float32
    assert torch.equal(ours, theirs)
    assert len(ours) == 16


def test_fp4_order_is_ascending():
    values = [reference.FP4[code] for code in reference.FP4_ASCENDING]
    assert values == sorted(values)
    assert sorted(reference.FP4_ASCENDING) == list(range(16))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantize_4bit(quant_type, blocksize, dtype):
    for seed, count in enumerate([blocksize * 5, blocksize * 3 + 18, blocksize - 2, 2]):
        weight = random(count, DTYPES[dtype], seed)
        packed = assert_equals_bitsandbytes(weight, blocksize, quant_type)
        assert count < 100 or len(reference.unpack_4bit(packed).unique()) >= 12


@PROPERTY
@given(
    st.sampled_from(["nf4", "fp4"]),
    st.sampled_from(BLOCKSIZES[:4]),
    st.sampled_from(sorted(DTYPES)),
    st.integers(1, 700).map(lambda half: 2 * half),
    st.sampled_from([1e-45, 1e-40, 1e-38, 1e-30, 1e-6, 0.02, 1.0, 3e4, 1e38]),
    st.integers(0, 10**6),
)
def test_quantize_4bit_of_any_size_and_scale(quant_type, blocksize, dtype, count, scale, seed):
    assert_equals_bitsandbytes(random(count, DTYPES[dtype], seed, scale), blocksize, quant_type)


@PROPERTY
@given(
    st.sampled_from(["nf4", "fp4"]),
    st.sampled_from(sorted(DTYPES)),
    st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 6e-8, 65504.0, 0.5]),
        min_size=1,
        max_size=50,
    ),
)
def test_quantize_4bit_of_special_values(quant_type, dtype, values):
    weight = torch.tensor(values * 2).to(DTYPES[dtype])
    assert_equals_bitsandbytes(weight, 32, quant_type)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-39, math.inf, -math.inf, math.nan])
def test_quantize_4bit_of_one_value_everywhere(quant_type, value):
    for count in (64, 96, 100):
        assert_equals_bitsandbytes(torch.full((count,), value), 64, quant_type)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_thresholds_are_midpoints_and_a_midpoint_goes_down(quant_type):
    values = reference.code_values(quant_type)
    ascending = values.sort().values
    middle = (ascending[:-1] + ascending[1:]) / 2
    above = torch.nextafter(middle, torch.tensor(math.inf))
    below = torch.nextafter(middle, torch.tensor(-math.inf))
    for probe, up in ((middle, False), (above, True), (below, False)):
        weight = torch.cat([probe, torch.zeros(32 - len(probe) - 1), torch.ones(1)])
        packed = assert_equals_bitsandbytes(weight, 32, quant_type)
        found = values[reference.unpack_4bit(packed)[: len(probe)].int()]
        assert torch.equal(found, ascending[1:] if up else ascending[:-1])


def test_quantize_spans_several_tiles():
    """More elements than one tile, with a blocksize that leaves a ragged tail."""
    count = 2 * reference.TILE + 3 * 64 + 10
    for quant_type in ("nf4", "fp4"):
        assert_equals_bitsandbytes(random(count, torch.bfloat16, 5), 64, quant_type)


def test_quantize_does_not_change_the_weight_and_takes_any_shape():
    weight = random(6 * 96, torch.bfloat16, 1).view(6, 96)
    before = weight.clone()
    packed, absmax = reference.quantize_4bit(weight, 64, "nf4")
    assert torch.equal(weight, before)
    again = reference.quantize_4bit(weight.T.contiguous().T, 64, "nf4")
    assert torch.equal(packed, again[0])
    assert torch.equal(absmax, again[1])


def test_odd_counts_are_refused():
    with pytest.raises(ValueError, match="33 codes do not fill whole bytes"):
        reference.quantize_4bit(torch.ones(33), 64, "nf4")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_full_last_block_in_the_tail_of_the_whole(quant_type):
    """A weight of 64 n + 32 elements ends in a ragged block, which a shard of blocksize 32 holds as a full one."""
    differ = 0
    for seed in range(300):
        weight = random(64 + 32, torch.float32, seed)
        tail = weight[64:]
        # A value close to a threshold times the absmax, where dividing and multiplying may part.
        tail[:15] = torch.nextafter(torch.tensor(reference._tables(quant_type, tail.device)[0]), torch.tensor(1.0))
        tail[:15] *= tail[15:].abs().max()
        whole, absmax = reference.quantize_4bit(weight, 64, quant_type)
        ragged = reference.encode_4bit(tail, absmax[1:], 32, quant_type, ragged=True)
        assert torch.equal(ragged, whole[32:])
        differ += not torch.equal(ragged, reference.encode_4bit(tail, absmax[1:], 32, quant_type))
    assert differ > 0, "no seed distinguishes division from multiplication"


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_finer_blocks_under_repeated_absmax_give_the_same_codes(quant_type):
    weight = random(64 * 20, torch.bfloat16, 3)
    packed, absmax = reference.quantize_4bit(weight, 64, quant_type)
    fine = reference.encode_4bit(weight, absmax.repeat_interleave(2), 32, quant_type)
    assert torch.equal(fine, packed)
    assert not torch.equal(reference.quantize_4bit(weight, 32, quant_type)[0], packed)


def test_unpack_takes_the_high_nibble_first():
    packed = torch.tensor([0x1F, 0xA0], dtype=torch.uint8)
    assert reference.unpack_4bit(packed).tolist() == [1, 15, 10, 0]


def flat_dequantized(packed, absmax, blocksize, quant_type, shape) -> torch.Tensor:
    """The definition, element by element: value of the code times the absmax of its block of the flat weight."""
    table = bnb.get_4bit_type(quant_type, device="cpu").numpy()
    scales, data = absmax.numpy(), packed.tolist()
    found = []
    for i in range(math.prod(shape)):
        code = data[i // 2] >> 4 if i % 2 == 0 else data[i // 2] & 15
        found.append(float(table[code] * scales[i // blocksize]))
    return torch.tensor(found, dtype=torch.float32).view(shape)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("shape", "blocksize"),
    [((4, 96), 64), ((3, 352), 64), ((5, 352), 256), ((2, 48), 32), ((6, 100), 64), ((8, 64), 64), ((1, 30), 64)],
)
def test_dequantize_4bit_follows_the_flat_definition(quant_type, shape, blocksize):
    weight = random(math.prod(shape), torch.bfloat16, 7)
    packed, absmax = reference.quantize_4bit(weight, blocksize, quant_type)
    found = reference.dequantize_4bit(packed, absmax, blocksize, quant_type, shape)
    assert found.shape == shape
    assert found.dtype is torch.float32
    assert torch.equal(bits(found), bits(flat_dequantized(packed, absmax, blocksize, quant_type, shape)))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("shape", "blocksize"), [((6, 64), 32), ((5, 128), 64), ((3, 768), 256), ((2, 4096), 4096)])
def test_dequantize_4bit_is_bitsandbytes_where_rows_are_whole_blocks(quant_type, shape, blocksize, dtype):
    weight = random(math.prod(shape), DTYPES[dtype], 11).view(shape)
    packed, state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type)
    with torch.compiler.set_stance("force_eager"):  # above 2048 bitsandbytes would compile its fallback
        theirs = bnb.dequantize_4bit(packed, state)
    ours = reference.dequantize_4bit(packed, state.absmax, blocksize, quant_type, shape)
    assert theirs.dtype is DTYPES[dtype]
    assert torch.equal(ours.to(theirs.dtype), theirs)


def test_dequantize_4bit_of_packed_columns_and_odd_shapes():
    """bitsandbytes stores codes as `[n / 2, 1]`; the count comes from the shape, not from the bytes."""
    weight = random(64, torch.float32, 2)
    packed, absmax = reference.quantize_4bit(weight, 64, "nf4")
    whole = reference.dequantize_4bit(packed, absmax, 64, "nf4", (64,))
    assert torch.equal(reference.dequantize_4bit(packed.view(-1, 1), absmax, 64, "nf4", (8, 8)), whole.view(8, 8))
    assert torch.equal(reference.dequantize_4bit(packed, absmax, 64, "nf4", (63,)), whole[:63])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("count", [64 * 5, 64 * 3 + 10])
def test_quantize_4bit_into_given_outputs(quant_type, count):
    weight = random(count, torch.bfloat16, 31)
    codes, absmax = torch.empty(count // 2, 1, dtype=torch.uint8), torch.empty(math.ceil(count / 64))
    found = reference.quantize_4bit(weight, 64, quant_type, codes=codes, absmax=absmax)
    assert [tensor.data_ptr() for tensor in found] == [codes.data_ptr(), absmax.data_ptr()]
    expected = reference.quantize_4bit(weight, 64, quant_type)
    assert torch.equal(codes.view(-1), expected[0])
    assert torch.equal(absmax, expected[1])
    with pytest.raises(ValueError, match="the output is torch"):
        reference.quantize_4bit(weight, 64, quant_type, codes=codes[1:])


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_dequantize_4bit_casts_the_float32_product(dtype):
    packed, absmax = reference.quantize_4bit(random(500, torch.float32, 33), 64, "nf4")
    found = reference.dequantize_4bit(packed, absmax, 64, "nf4", (50, 10), DTYPES[dtype])
    assert found.dtype is DTYPES[dtype]
    assert torch.equal(found, reference.dequantize_4bit(packed, absmax, 64, "nf4", (50, 10)).to(DTYPES[dtype]))
