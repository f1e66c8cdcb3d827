"""The native kernels against the reference, bit for bit: every instruction set there is here, one to three threads."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import same
from kernel_samples import DTYPES, random, specials

from distquant.kernels import reference

cpu = pytest.importorskip("distquant.kernels.cpu", reason="the native kernels were not built")
from distquant.kernels.cpu import library  # noqa: E402

PROPERTY = settings(deadline=None, derandomize=True, max_examples=40)

ISAS = library.available()
BLOCKS = [(None, None), (1, None), (None, 40), (128, 128), (3, 7), (2, 16)]
LARGE = 3 * 2**17 + 66
"""Elements that are worth three threads."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def weight(shape: tuple[int, ...], dtype: str, scale: float, special: int, seed: int) -> torch.Tensor:
    """Normal numbers times `scale`, of which every `special`-th is none (0: all are normal)."""
    made = random(math.prod(shape), torch.float32, seed, scale)
    if special:
        made[::special] = specials(len(made[::special]), torch.float32, seed)
    return made.to(DTYPES[dtype]).view(shape)


weights = st.tuples(
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from([1e-45, 1e-40, 1e-37, 1e-8, 1e-6, 0.02, 1.0, 448.0, 3e4, 1e37]),
    st.sampled_from([0, 0, 1, 2, 9, 50]),
    st.integers(0, 10**6),
)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 300))
quant_types = st.sampled_from(["nf4", "fp4"])


def on_every_isa(name: str, *arguments: Any, **named: Any) -> Any:
    """The reference's result of a function, after every instruction set gave the same."""
    expected = getattr(reference, name)(*arguments, **named)
    for isa in ISAS:
        with library.running(isa):
            same(getattr(cpu, name)(*arguments, **named), expected, f"{name} on {isa}")
    return expected


def test_this_machine_runs_more_than_the_portable_kernels() -> None:
    assert ISAS[0] == "portable"
    assert cpu.isa() == os.environ.get(library.VARIABLE, ISAS[-1])
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert "avx2" in ISAS


@PROPERTY
@given(weights, st.integers(1, 700), quant_types, st.sampled_from([32, 34, 64, 100, 128, 256, 4096]))
def test_4bit(kind, half, quant_type, blocksize):
    source = weight((2 * half,), *kind)
    codes, absmax = on_every_isa("quantize_4bit", source, blocksize, quant_type)
    for dtype in DTYPES.values():
        on_every_isa("dequantize_4bit", codes, absmax, blocksize, quant_type, (2 * half - 1,), dtype)
    if blocksize in (32, 64, 128, 256, 4096):
        theirs, state = bnb.quantize_4bit(source, blocksize=blocksize, quant_type=quant_type)
        same((codes, absmax), (theirs.view(-1), state.absmax), "bitsandbytes")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_4bit_on_the_thresholds_and_beside_them(quant_type, dtype):
    ascending = reference.code_values(quant_type).sort().values
    middle = (ascending[:-1] + ascending[1:]) / 2
    beside = [torch.nextafter(middle, torch.tensor(way)) for way in (math.inf, -math.inf)]
    probes = torch.cat([middle, *beside, torch.ones(64 - 45)]).to(DTYPES[dtype])
    codes, absmax = on_every_isa("quantize_4bit", probes, 64, quant_type)
    theirs, state = bnb.quantize_4bit(probes, blocksize=64, quant_type=quant_type)
    same((codes, absmax), (theirs.view(-1), state.absmax), "bitsandbytes")


BFLOATS = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
"""All of them."""


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("exponent", [-133, -127, -126, -101, -100, -99, -20, -1, 0, 7, 60, 99, 100, 101, 127])
def test_every_bfloat16_of_many_blocks(quant_type, exponent):
    """Codes of bfloat16 are found on its grid, to which the thresholds are brought down, a block at a time."""
    for step in range(0, 128, 9):
        absmax = torch.tensor((1 + step / 128) * 2.0**exponent).bfloat16()
        rest = BFLOATS[BFLOATS.abs() <= absmax]
        rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(step))]
        rest = rest[: len(rest) // 63 * 63].view(-1, 63)
        source = torch.cat([rest, absmax.expand(len(rest), 1)], dim=1)
        if len(source):
            on_every_isa("quantize_4bit", source, 64, quant_type)


def test_thresholds_on_the_grid_of_bfloat16():
    """Given absmax that bring a threshold exactly to a bfloat16, and the ones beside them."""
    thresholds = torch.tensor(reference._tables("nf4", torch.device("cpu"))[0])
    grid = torch.arange(1, 2, 2.0**-7)
    on_it = (grid.view(-1, 1) / thresholds.abs()).view(-1)
    absmax = torch.cat([torch.nextafter(on_it, torch.tensor(way)) for way in (0.0, math.inf)] + [on_it])
    values = torch.cat([grid, -grid])[None, :].expand(len(absmax), -1)[:, :192]
    source = torch.nn.functional.pad(values, (0, 256 - values.shape[1]), value=1.0).bfloat16()
    on_every_isa("encode_4bit", source, absmax, 256, "nf4")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_ragged_tail_is_divided(quant_type):
    """Just above a threshold times the absmax, where a division and a product with the reciprocal may part."""
    bounds, differ = torch.tensor(reference._tables(quant_type, torch.device("cpu"))[0]), 0
    for seed in range(40):
        tail = random(16, torch.float32, seed)
        tail[:15] = torch.nextafter(bounds, torch.tensor(1.0)) * tail[15].abs()
        codes, absmax = on_every_isa(
            "quantize_4bit", torch.cat([random(64, torch.float32, seed), tail]), 64, quant_type
        )
        whole = on_every_isa("encode_4bit", tail.repeat(2), absmax[1:], 32, quant_type)
        divided = on_every_isa("encode_4bit", tail.repeat(2), absmax[1:], 32, quant_type, True)
        assert torch.equal(divided[:8], codes[32:])
        differ += not torch.equal(divided, whole)
    assert differ, "no case distinguishes a division from a product"


@PROPERTY
@given(weights, st.integers(1, 40), quant_types, st.booleans())
def test_encode_4bit_under_given_absmax(kind, blocks, quant_type, ragged):
    source = weight((32 * blocks,), *kind)
    absmax = reference.block_absmax(source, 32) * 1.5
    on_every_isa("encode_4bit", source, absmax, 32, quant_type, ragged)


@PROPERTY
@given(weights, st.integers(1, 1500), st.sampled_from([256, 64, 7]))
def test_blockwise(kind, count, blocksize):
    source, code = weight((count,), *kind).float(), bnb.create_dynamic_map()
    codes, absmax = on_every_isa("quantize_blockwise", source, code, blocksize)
    on_every_isa("dequantize_blockwise", codes, absmax, code, blocksize)
    if source.isfinite().all():  # it leaves NaN to the compiler
        theirs, state = bnb.quantize_blockwise(source, code=code, blocksize=blocksize)
        same((codes, absmax), (theirs, state.absmax), "bitsandbytes")


def test_blockwise_beside_the_edges_at_which_codes_change():
    code = bnb.create_dynamic_map()
    table = reference.blockwise_table(code)
    edges = (table[1:] != table[:-1]).nonzero().view(-1) + 1
    around = ((edges.double() - 0.5) / 65535 * 2 - 1).float().view(torch.int32).view(-1, 1) + torch.arange(-40, 41)
    source = torch.cat([around.view(-1).to(torch.int32).view(torch.float32), torch.ones(1)])
    source = source[source.abs() <= 1]  # steps in the bits around 0 lead to NaN
    codes, _ = on_every_isa("quantize_blockwise", source, code, len(source))
    same(codes, bnb.quantize_blockwise(source, code=code, blocksize=len(source))[0])
    assert torch.equal(codes.unique(), table.unique())


def test_int8_factors_are_rounded_twice():
    """Halves of steps of rows whose absmax is 127 / 128 times a power of two are ties, or just not."""
    absmax = torch.arange(1, 2, 2**-10).view(-1, 1)
    source = torch.cat([absmax, (absmax * (torch.arange(127) + 0.5) / 127)], dim=1).half()
    codes, found = on_every_isa("quantize_int8_rows", source)
    once = (source.float() * (127.0 / found.double()).float().view(-1, 1)).round()
    assert not torch.equal(codes.float(), once), "no case distinguishes one rounding from two"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_int8_of_every_value_in_rows_of_many_absmax(dtype):
    """The cast to float16 is left out where it changes nothing: beyond 2^-17, and under an absmax of 2^-8 or more."""
    values = BFLOATS if dtype == "bfloat16" else BFLOATS.view(torch.float16)
    for exponent in (-24, -17, -10, -9, -8, -7, 0, 9, 15, 16, 127):
        limit = torch.tensor(1.5 * 2.0 ** min(exponent, 15 if dtype == "float16" else 127)).to(values.dtype)
        row = values[values.abs() <= limit]
        _, absmax = on_every_isa("quantize_int8_rows", row.view(1, -1))
        on_every_isa("encode_int8_rows", torch.cat([row, values[values.isnan()]]).view(1, -1), absmax)


@PROPERTY
@given(weights, shapes)
def test_int8_rows(kind, shape):
    source = weight(shape, *kind)
    _, absmax = on_every_isa("quantize_int8_rows", source)
    on_every_isa("encode_int8_rows", source, absmax * 1.25)


@PROPERTY
@given(weights, shapes, st.sampled_from(BLOCKS))
def test_fp8(kind, shape, block):
    source = weight(shape, *kind)
    codes, scale = on_every_isa("quantize_fp8", source, block)
    on_every_isa("encode_fp8", source, reference.block_amax(source, block) * 1.5, block)
    on_every_isa("quantize_fp8_ue8m0", source, block)
    for dtype in DTYPES.values():
        on_every_isa("dequantize_fp8", codes, scale, block, dtype)


@PROPERTY
@given(weights, shapes, st.sampled_from([(1, None), (1, 32), (3, 7), (None, None)]))
def test_block_amax(kind, shape, block):
    on_every_isa("block_amax", weight(shape, *kind), block)


FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@PROPERTY
@given(weights, shapes, st.booleans(), st.booleans(), st.sampled_from([(-128, 127), (-64, 63), (-1, 0)]), st.data())
def test_scaled_rows(kind, shape, inverse, rounded, bounds, data):
    """Under scales that leave nothing to clamp, clamp nearly all, and are none."""
    source = weight(shape, *kind)
    ordinary = reference.block_amax(source, (1, None)).view(-1) / 127
    odd = [0.0, 1e-45, 1e-38, math.inf, math.nan, 1.0]
    scale = torch.tensor([data.draw(st.sampled_from([s, s, s / 3, *odd])) for s in ordinary.tolist()])
    named = {"inverse": inverse, "rounded": rounded}
    on_every_isa("encode_scaled_rows", source, scale, torch.int8, low=bounds[0], high=bounds[1], **named)
    for dtype in FLOAT8:
        on_every_isa("encode_scaled_rows", source, scale, dtype, **named)


@PROPERTY
@given(weights, shapes)
def test_fp8_rows_of_fbgemm(kind, shape):
    on_every_isa("quantize_fp8_rows", weight(shape, *kind))


def test_every_code_of_fp8_and_what_lies_between():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(1, -1)
    on_every_isa("dequantize_fp8", codes, torch.ones(1, 1), (None, None))
    values = codes.float().view(-1).nan_to_num(0.0).sort().values
    middle = (values[:-1] + values[1:]) / 2
    beside = [torch.nextafter(middle, torch.tensor(way)) for way in (math.inf, -math.inf)]
    found, scale = on_every_isa("quantize_fp8", torch.cat([values, middle, *beside]).view(1, -1), (None, None))
    assert scale.item() == 1.0
    assert torch.equal(found[0, :256].float(), values)


@PROPERTY
@given(weights, shapes, st.sampled_from([1, 7, 32, 128]), st.sampled_from([4, 8]), st.booleans())
def test_groups(kind, shape, group_size, bits, symmetric):
    found = on_every_isa("quantize_groups", weight(shape, *kind), group_size, bits, symmetric)
    for dtype in DTYPES.values():
        on_every_isa("dequantize_groups", *found, group_size, dtype)


@PROPERTY
@given(weights, st.integers(1, 9), st.integers(1, 9))
def test_mxfp4(kind, rows, runs):
    found = on_every_isa("quantize_mxfp4", weight((rows, 32 * runs), *kind))
    for dtype in DTYPES.values():
        on_every_isa("dequantize_mxfp4", *found, dtype)


def test_every_code_and_scale_of_mxfp4_and_what_lies_between():
    pairs = torch.arange(16, dtype=torch.uint8)
    codes, scale = (pairs | (pairs.flip(0) << 4)).repeat(256, 1), torch.arange(256).to(torch.uint8).view(256, 1)
    for dtype in DTYPES.values():
        on_every_isa("dequantize_mxfp4", codes, scale, dtype)
    values = torch.tensor(reference.mxfp4.E2M1)
    middle = (values[:-1] + values[1:]) / 2
    beside = [torch.nextafter(middle, torch.tensor(way)) for way in (math.inf, -math.inf)]
    runs = torch.stack([torch.cat([row, values, torch.zeros(17)]) for row in (middle, *beside)])
    for power in range(-126, 126):
        on_every_isa("quantize_mxfp4", torch.cat([runs, -runs]) * 2.0**power)


@pytest.mark.parametrize("shape", [(LARGE // 2, 2), (3, LARGE // 3), (130, LARGE // 130 // 2 * 2)])
@pytest.mark.parametrize("isa", ISAS)
def test_threads_change_nothing(isa, shape):
    source = weight(shape, "bfloat16", 1.0, 97, 5)
    runs = []
    for count in (1, 2, 3):
        with threads(count), library.running(isa):
            found = [*cpu.quantize_4bit(source, 64, "nf4"), *cpu.quantize_int8_rows(source)]
            found += [out for block in BLOCKS for out in cpu.quantize_fp8(source, block)]
            found += cpu.quantize_groups(source, 32, 4, False)
            found += cpu.quantize_mxfp4(source.reshape(-1)[: source.numel() // 32 * 32].view(-1, 32))
            found += cpu.quantize_blockwise(source.float(), bnb.create_dynamic_map(), 256)
            found += [cpu.dequantize_4bit(found[0], found[1], 64, "nf4", shape, torch.bfloat16)]
            runs.append(found)
    for run in runs[1:]:
        same(tuple(run), tuple(runs[0]))
    same(tuple(runs[0][:2]), reference.quantize_4bit(source, 64, "nf4"))


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_no_thread_outlives_a_call():
    source = random(LARGE, torch.bfloat16, 1)
    with threads(3):
        before = os.listdir("/proc/self/task")
        cpu.quantize_4bit(source, 64, "nf4")
        assert os.listdir("/proc/self/task") == before


def test_outputs_are_written_in_place_and_nothing_beside_them():
    whole = weight((6, 70), "float16", 1.0, 0, 3)
    for name, arguments, outputs in [
        ("quantize_4bit", (64, "fp4"), {"codes": (torch.uint8, 210), "absmax": (torch.float32, 7)}),
        ("quantize_int8_rows", (), {"codes": (torch.int8, 420), "absmax": (torch.float32, 6)}),
        ("quantize_fp8", ((4, 32),), {"codes": (torch.float8_e4m3fn, 420), "scale": (torch.float32, 6)}),
        ("quantize_fp8_ue8m0", ((4, 32),), {"codes": (torch.float8_e4m3fn, 420), "scale": (torch.float8_e8m0fnu, 6)}),
        (
            "quantize_groups",
            (32, 8, False),
            {"codes": (torch.int8, 420), "scale": (torch.float16, 18), "zero": (torch.int8, 18)},
        ),
        ("quantize_mxfp4", (), {"codes": (torch.uint8, 192), "scale": (torch.uint8, 12)}),
    ]:
        source = whole if name != "quantize_mxfp4" else whole[:, :64]
        expected = getattr(reference, name)(source, *arguments)
        for isa in ISAS:
            memory = {key: torch.full((n + 100,), 77.0).to(dtype) for key, (dtype, n) in outputs.items()}
            slices = {key: memory[key][50 : 50 + n] for key, (_, n) in outputs.items()}
            with library.running(isa):
                found = getattr(cpu, name)(source, *arguments, **slices)
            same(found, expected, name)
            for (key, around), result in zip(memory.items(), found, strict=True):
                assert result.data_ptr() == slices[key].data_ptr()
                assert (torch.cat([around[:50], around[-50:]]).float() == memory[key][0].float()).all()


def test_strided_weights_and_empty_ones():
    wide = weight((48, 64), "bfloat16", 1.0, 0, 2)
    on_every_isa("quantize_4bit", wide.T, 64, "nf4")
    on_every_isa("quantize_int8_rows", wide[::2, 3:50])
    on_every_isa("quantize_fp8", wide[:, 1::3], (16, 16))
    on_every_isa("quantize_4bit", wide[:0], 64, "nf4")
    on_every_isa("quantize_fp8", wide[:0], (16, 16))
    on_every_isa("quantize_groups", wide[:0], 32, 4, True)
    on_every_isa("quantize_mxfp4", wide[::2, 3:35])
    on_every_isa("quantize_mxfp4", wide[:0])
