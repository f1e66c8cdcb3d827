"""Triton kernels against the reference, case by case: in the interpreter (run as a program) or on a GPU.

    TRITON_INTERPRET=1 python tests/kernel_cases.py

prints one line of JSON: the name of each case and what is wrong with it, or null.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from kernel_samples import DTYPES, random, specials

from distquant.kernels import reference

Case = Callable[[Any, str], None]
"""Takes the kernels under test and the device; raises AssertionError."""


def same(found: Any, expected: Any, what: str = "") -> None:
    """Equal in dtype, shape and every bit, but for the payload of a NaN."""
    if isinstance(expected, tuple):
        assert len(found) == len(expected), what
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            same(one, other, f"{what} result {number}")
        return
    if expected is None:
        assert found is None, what
        return
    found, expected = found.cpu(), expected.cpu()
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), f"{what}: {found.dtype} {found.shape}"
    if found.is_floating_point() and found.element_size() == 1:
        found, expected = found.view(torch.uint8), expected.view(torch.uint8)
    elif found.is_floating_point():
        integer = torch.int32 if found.dtype is torch.float32 else torch.int16
        found, expected = (torch.where(t.isnan(), math.nan, t).view(integer) for t in (found, expected))
    wrong = (found != expected).nonzero()
    first = wrong[0].tolist() if len(wrong) else None
    assert first is None, (
        f"{what}: {len(wrong)} of {found.numel()} differ, first at {first}: "
        f"{found[tuple(first)].item()} instead of {expected[tuple(first)].item()}"
    )


def weights(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Plain, tiny, huge and special ones, and one seen through a wider matrix."""
    count = math.prod(shape)
    large = count > 20_000
    slow = device == "cpu"  # the interpreter's
    for scale in (1.0, 1e37) if large else (1.0, 1e-40) if slow else (1.0, 1e-40, 1e-7, 3e4, 1e37):
        yield f"scale {scale}", random(count, torch.float32, 1, scale).to(dtype).view(shape).to(device)
    if large:
        return
    yield "specials", specials(count, dtype, 2).view(shape).to(device)
    mixed = random(count, dtype, 3)
    mixed[::37] = specials(len(mixed[::37]), dtype, 4)
    yield "mixed", mixed.view(shape).to(device)
    yield "zeros", torch.zeros(shape, dtype=dtype, device=device)
    if len(shape) == 2:
        wide = random(shape[0] * (shape[1] + 5), dtype, 5).view(shape[0], -1).to(device)
        yield "columns of a wider one", wide[:, 2 : 2 + shape[1]]


def chosen_dtypes(what: str) -> list[torch.dtype]:
    """Into which to dequantize: all of them, of some weights."""
    return list(DTYPES.values()) if what in ("mixed", "scale 1e-40") else []


def case_4bit(gpu: Any, device: str, quant_type: str, dtype: str, blocksize: int, shape: tuple[int, ...]) -> None:
    for what, weight in weights(shape, DTYPES[dtype], device):
        expected = reference.quantize_4bit(weight.cpu(), blocksize, quant_type)
        codes, absmax = (torch.empty_like(tensor, device=device) for tensor in expected)
        same(gpu.quantize_4bit(weight, blocksize, quant_type), expected, what)
        gpu.quantize_4bit(weight, blocksize, quant_type, codes=codes, absmax=absmax)
        same((codes, absmax), expected, f"{what}, into outputs")
        for ragged in (False, True):
            found = gpu.encode_4bit(weight, absmax, blocksize, quant_type, ragged)
            same(found, reference.encode_4bit(weight.cpu(), expected[1], blocksize, quant_type, ragged), what)
        for to in chosen_dtypes(what):
            found = gpu.dequantize_4bit(codes, absmax, blocksize, quant_type, shape, to)
            same(found, reference.dequantize_4bit(*expected, blocksize, quant_type, shape, to), what)


def case_4bit_thresholds(gpu: Any, device: str, quant_type: str) -> None:
    """On, above and below every threshold; whole and ragged."""
    bounds = torch.tensor(reference._tables(quant_type, torch.device("cpu"))[0])
    near = [bounds, *(torch.nextafter(bounds, torch.tensor(to)) for to in (-math.inf, math.inf))]
    for count in (64, 62):
        weight = torch.cat([*near, torch.zeros(count - 46), torch.ones(1)])
        for scale in (1.0, 0.7, 3e-5):
            found = gpu.quantize_4bit((weight * scale).to(device), 64, quant_type)
            same(found, reference.quantize_4bit(weight * scale, 64, quant_type), f"{count} * {scale}")


def case_int8(gpu: Any, device: str, dtype: str, shape: tuple[int, int]) -> None:
    for what, weight in weights(shape, DTYPES[dtype], device):
        expected = reference.quantize_int8_rows(weight.cpu())
        codes, absmax = (torch.empty_like(tensor, device=device) for tensor in expected)
        same(gpu.quantize_int8_rows(weight), expected, what)
        gpu.quantize_int8_rows(weight, codes=codes, absmax=absmax)
        same((codes, absmax), expected, f"{what}, into outputs")
        larger = expected[1] * 1.25
        found = gpu.encode_int8_rows(weight, larger.to(device))
        same(found, reference.encode_int8_rows(weight.cpu(), larger), f"{what}, given absmax")


def case_fp8(gpu: Any, device: str, dtype: str, block: reference.Block, shape: tuple[int, int]) -> None:
    for what, weight in weights(shape, DTYPES[dtype], device):
        expected = reference.quantize_fp8(weight.cpu(), block)
        codes, scale = (torch.empty_like(tensor, device=device) for tensor in expected)
        same(gpu.quantize_fp8(weight, block), expected, what)
        gpu.quantize_fp8(weight, block, codes=codes, scale=scale)
        same((codes, scale), expected, f"{what}, into outputs")
        amax = reference.block_amax(weight.cpu(), block) * 2
        found = gpu.encode_fp8(weight, amax.to(device), block)
        same(found, reference.encode_fp8(weight.cpu(), amax, block), f"{what}, given amax")
        for to in chosen_dtypes(what):
            same(gpu.dequantize_fp8(codes, scale, block, to), reference.dequantize_fp8(*expected, block, to), what)


def case_fp8_powers(gpu: Any, device: str, dtype: str, block: reference.Block, shape: tuple[int, int]) -> None:
    _quantized_equally("quantize_fp8_ue8m0", gpu, device, dtype, shape, block)


def case_fp8_rows(gpu: Any, device: str, dtype: str, shape: tuple[int, int]) -> None:
    _quantized_equally("quantize_fp8_rows", gpu, device, dtype, shape)


def _quantized_equally(name: str, gpu: Any, device: str, dtype: str, shape: tuple[int, int], *args: Any) -> None:
    for what, weight in weights(shape, DTYPES[dtype], device):
        expected = getattr(reference, name)(weight.cpu(), *args)
        codes, scale = (torch.empty_like(tensor, device=device) for tensor in expected)
        same(getattr(gpu, name)(weight, *args), expected, what)
        getattr(gpu, name)(weight, *args, codes=codes, scale=scale)
        same((codes, scale), expected, f"{what}, into outputs")


def case_scaled_rows(gpu: Any, device: str, dtype: str, code: str, shape: tuple[int, int]) -> None:
    to = getattr(torch, code)
    for what, weight in weights(shape, DTYPES[dtype], device):
        largest = torch.finfo(to).max if to.is_floating_point else 127
        amax = reference.row_absmax(weight.cpu().float())
        scale = (amax / largest).view(-1)
        scale[0] = 0.0
        others = [{"inverse": True}, {"rounded": True}, {"low": -7, "high": 7}]
        for options in [{}, *(others if chosen_dtypes(what) else [])]:
            expected = reference.encode_scaled_rows(weight.cpu(), scale, to, **options)
            same(gpu.encode_scaled_rows(weight, scale.to(device), to, **options), expected, f"{what} {options}")
        codes = torch.empty_like(expected, device=device)
        gpu.encode_scaled_rows(weight, scale.to(device), to, codes=codes, **options)
        same(codes, expected, f"{what}, into outputs")


def case_fp8_every_value(gpu: Any, device: str) -> None:
    """Every bfloat16 in [-448, 448] under scale 1, and float32 on and next to every place where e4m3 rounds."""
    positive = torch.arange(0x43E1, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (values[1:] + values[:-1]) / 2
    near = [torch.nextafter(middle, torch.tensor(to)) for to in (0.0, 1e9)]
    row = torch.cat([positive, middle, *near])
    row = torch.cat([row, -row])[None].to(device)
    amax = torch.full((1, 1), 448.0)
    found = gpu.encode_fp8(row, amax.to(device), (1, None))
    same(found, reference.encode_fp8(row.cpu(), amax, (1, None)))
    same(found[0], row.cpu().to(torch.float8_e4m3fn), "torch's own cast")
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).view(1, 256)
    one = torch.ones(1, 1)
    same(gpu.dequantize_fp8(codes.to(device), one.to(device), (1, None)), codes.float(), "every code")


def case_groups(gpu: Any, device: str, dtype: str, kind: tuple[int, bool], group: int, shape: tuple[int, int]) -> None:
    for what, weight in weights(shape, DTYPES[dtype], device):
        expected = reference.quantize_groups(weight.cpu(), group, *kind)
        same(gpu.quantize_groups(weight, group, *kind), expected, what)
        codes, scale, zero = (None if t is None else torch.empty_like(t, device=device) for t in expected)
        gpu.quantize_groups(weight, group, *kind, codes=codes, scale=scale, zero=zero)
        same((codes, scale, zero), expected, f"{what}, into outputs")
        for to in chosen_dtypes(what):
            found = gpu.dequantize_groups(codes, scale, zero, group, to)
            same(found, reference.dequantize_groups(*expected, group, to), what)


def case_mxfp4(gpu: Any, device: str, dtype: str, shape: tuple[int, int]) -> None:
    for what, weight in weights(shape, DTYPES[dtype], device):
        expected = reference.quantize_mxfp4(weight.cpu())
        same(gpu.quantize_mxfp4(weight), expected, what)
        codes, scale = (torch.empty_like(tensor, device=device) for tensor in expected)
        gpu.quantize_mxfp4(weight, codes=codes, scale=scale)
        same((codes, scale), expected, f"{what}, into outputs")
        for to in chosen_dtypes(what):
            same(gpu.dequantize_mxfp4(codes, scale, to), reference.dequantize_mxfp4(*expected, to), what)


def case_mxfp4_every_value(gpu: Any, device: str) -> None:
    """Every code under every scale, and every place where e2m1 rounds, and what lies beside it."""
    pairs = torch.arange(16, dtype=torch.uint8)
    codes, scale = (pairs | (pairs.flip(0) << 4)).repeat(256, 1), torch.arange(256).to(torch.uint8).view(256, 1)
    for to in DTYPES.values():
        found = gpu.dequantize_mxfp4(codes.to(device), scale.to(device), to)
        same(found, reference.dequantize_mxfp4(codes, scale, to), f"every code as {to}")
    values = torch.tensor(reference.mxfp4.E2M1)
    middle = (values[:-1] + values[1:]) / 2
    beside = [torch.nextafter(middle, torch.tensor(way)) for way in (math.inf, -math.inf)]
    runs = torch.stack([torch.cat([row, values, torch.zeros(17)]) for row in (middle, *beside)])
    powers = torch.exp2(torch.arange(-126.0, 126.0)).view(-1, 1, 1)
    weight = (torch.cat([runs, -runs]) * powers).flatten(0, 1)
    same(gpu.quantize_mxfp4(weight.to(device)), reference.quantize_mxfp4(weight), "ties")


def case_blockwise(gpu: Any, device: str, blocksize: int, count: int) -> None:
    code = torch.cat([-(torch.rand(255, generator=torch.Generator().manual_seed(0)) ** 3), torch.ones(1)]).sort().values
    for what, values in weights((count,), torch.float32, device):
        expected = reference.quantize_blockwise(values.cpu(), code, blocksize)
        codes, absmax = (torch.empty_like(tensor, device=device) for tensor in expected)
        same(gpu.quantize_blockwise(values, code.to(device), blocksize), expected, what)
        gpu.quantize_blockwise(values, code.to(device), blocksize, codes=codes, absmax=absmax)
        same((codes, absmax), expected, f"{what}, into outputs")
        found = gpu.dequantize_blockwise(codes, absmax, code.to(device), blocksize)
        same(found, reference.dequantize_blockwise(*expected, code, blocksize), what)


def case_refusals(gpu: Any, device: str) -> None:
    calls = {
        "33 codes do not fill": lambda: gpu.quantize_4bit(torch.ones(33, device=device), 64, "nf4"),
        "powers of two": lambda: gpu.quantize_4bit(torch.ones(96, device=device), 96, "nf4"),
        "48 columns": lambda: gpu.quantize_mxfp4(torch.ones(2, 48, device=device)),
        "groups of 3 bits": lambda: gpu.quantize_groups(torch.ones(2, 4, device=device), 4, 3, True),
        "float64": lambda: gpu.quantize_fp8(torch.ones(2, 4, device=device).double(), (1, None)),
        "the output is": lambda: gpu.quantize_int8_rows(torch.ones(2, 4, device=device), absmax=torch.ones(3)),
    }
    for message, call in calls.items():
        try:
            call()
        except ValueError as error:
            assert message in str(error), f"{message!r} is not in {error}"
        else:
            raise AssertionError(f"nothing is refused where {message!r} is expected")


def cases() -> dict[str, Case]:
    """All cases by name."""
    found: dict[str, Case] = {}

    def add(function: Callable[..., None], *options: list[Any]) -> None:
        for chosen in itertools.product(*options):
            name = " ".join([function.__name__.removeprefix("case_"), *map(str, chosen)])
            found[name] = lambda gpu, device, chosen=chosen: function(gpu, device, *chosen)

    dtypes = sorted(DTYPES)
    add(case_4bit, ["nf4", "fp4"], dtypes, [64], [(7, 96)])
    add(case_4bit, ["nf4", "fp4"], ["bfloat16"], [32, 4096], [(5, 1302), (2,)])
    add(case_4bit, ["nf4"], ["bfloat16"], [64], [(64 * 130,)])
    add(case_4bit_thresholds, ["nf4", "fp4"])
    add(case_int8, dtypes, [(1, 1), (33, 77)])
    add(case_int8, ["bfloat16"], [(3, 8300)])
    add(case_fp8, dtypes, [(None, None)], [(7, 50)])
    add(case_fp8, ["bfloat16"], [(1, None), (3, 24)], [(7, 50)])
    add(case_fp8, ["float32"], [(128, 128)], [(130, 150)])
    add(case_fp8, ["bfloat16"], [(1, None)], [(2, 33000)])
    add(case_fp8, ["bfloat16"], [(None, None)], [(4, 33000)])
    add(case_fp8_powers, dtypes, [(1, 32)], [(7, 96)])
    add(case_fp8_powers, ["bfloat16"], [(128, 128)], [(130, 150)])
    add(case_fp8_powers, ["bfloat16"], [(1, 20), (None, None)], [(7, 50)])
    add(case_fp8_powers, ["float32"], [(1, None), (1, 32)], [(2, 33000)])
    add(case_fp8_rows, dtypes, [(1, 1), (9, 300)])
    add(case_fp8_rows, ["bfloat16"], [(2, 33000)])
    add(case_scaled_rows, dtypes, ["int8", "float8_e4m3fn"], [(9, 520)])
    add(case_scaled_rows, ["bfloat16"], ["float8_e5m2"], [(9, 60)])
    add(case_fp8_every_value)
    add(case_groups, dtypes, [(4, True), (4, False), (8, True), (8, False)], [32, 24], [(9, 100)])
    add(case_groups, ["bfloat16"], [(4, True), (4, False)], [128], [(3, 256)])
    add(case_mxfp4, dtypes, [(9, 96)])
    add(case_mxfp4, ["bfloat16"], [(130, 256)])
    add(case_mxfp4_every_value)
    add(case_blockwise, [256, 100], [1, 256, 700])
    add(case_refusals)
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    from distquant.kernels import gpu

    wrong: dict[str, str | None] = {}
    for name, case in cases().items():
        try:
            case(gpu, "cpu")
            wrong[name] = None
        except Exception as error:
            wrong[name] = str(error) if isinstance(error, AssertionError) else traceback.format_exc(limit=-4)
    json.dump(wrong, sys.stdout)


if __name__ == "__main__":
    main()
