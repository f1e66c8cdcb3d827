"""Speed of the CPU kernels on one thread, beside the reference in plain torch and bitsandbytes' kernels for the CPU.

    python benchmarks/cpu_kernels.py [--parameters 16777216] [--runs 5] [--out FILE]

Every contestant works on the same bfloat16 weight `[parameters / 4096, 4096]` (dequantization on its codes, the second
level on the absmax of every four elements). Ours and the reference write into existing outputs, as a load does.
bitsandbytes makes its own outputs, and all contestants do for dequantization. They take turns (A B C A B C ...).

Before anything is timed, results are compared bit by bit (a NaN equals a NaN). A kernel of ours that differs from the
reference ends the benchmark.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # before torch comes

import torch
from common import machine, table, write
from torch import Tensor

PACKAGES = ("distquant", "torch", "bitsandbytes")
COLUMNS = 4096
BLOCK, SECOND = 64, 256
STATISTICS = 4
"""Elements for each absmax of the second level: more absmax than a weight has, enough to be timed."""
BARS = {"nf4, blocks of 64": 40.0}
"""The least speed of a kernel, as a multiple of bitsandbytes' speed."""

Results = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: label of the row.
        function: name in `distquant.kernels.cpu` and `reference`.
        given: makes the arguments from a weight.
        outputs: keywords of outputs that are written in place.
        theirs: does the same by bitsandbytes, from the weight and the arguments; None if it lacks such a kernel.
        parameters: parameters for each element of the first argument.
    """

    name: str
    function: str
    given: Callable[[Tensor], tuple[Any, ...]]
    outputs: tuple[str, ...] = ()
    theirs: Callable[..., Any] | None = None
    parameters: int = 1


# -- bitsandbytes' kernels ---------------------------------------------------------------------------------------------


def their_4bit(weight: Tensor, blocksize: int, quant_type: str) -> Results:
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type)
    return codes.view(-1), state.absmax


def their_int8(weight: Tensor) -> Results:
    from bitsandbytes import functional

    return functional.int8_vectorwise_quant(weight.half())[:2]


def their_second_level(values: Tensor, code: Tensor, blocksize: int) -> Results:
    from bitsandbytes import functional

    codes, state = functional.quantize_blockwise(values, code=code, blocksize=blocksize)
    return codes, state.absmax


def their_dequantized(codes: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Any, dtype: Any) -> Tensor:
    from bitsandbytes import functional

    state = functional.QuantState(
        absmax,
        shape=torch.Size(shape),
        code=functional.get_4bit_type(quant_type, device="cpu"),
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=dtype,
    )
    return functional.dequantize_4bit(codes.view(-1, 1), state)


# -- the measurements --------------------------------------------------------------------------------------------------


def second_level(weight: Tensor) -> tuple[Any, ...]:
    """Returns absmax around zero, as double quantization stores them."""
    from bitsandbytes.functional import create_dynamic_map

    from distquant.kernels import reference

    absmax = reference.block_absmax(weight, STATISTICS)
    return absmax - absmax.mean(), create_dynamic_map(), SECOND


def packed(quant_type: str) -> Callable[[Tensor], tuple[Any, ...]]:
    def given(weight: Tensor) -> tuple[Any, ...]:
        from distquant.kernels import cpu

        codes, absmax = cpu.quantize_4bit(weight, BLOCK, quant_type)
        return codes, absmax, BLOCK, quant_type, tuple(weight.shape), torch.bfloat16

    return given


def cases() -> list[Case]:
    four, fp8, groups = ("codes", "absmax"), ("codes", "scale"), ("codes", "scale", "zero")
    cases = [Case(f"{kind}, blocks of 64", "quantize_4bit", lambda w, kind=kind: (w, BLOCK, kind), four, their_4bit)
             for kind in ("nf4", "fp4")]  # fmt: skip
    cases.append(Case("int8 rows", "quantize_int8_rows", lambda w: (w,), four, their_int8))
    for name, block in (("tensor", (None, None)), ("rows", (1, None)), ("128 x 128", (128, 128))):
        cases.append(Case(f"fp8, {name}", "quantize_fp8", lambda w, block=block: (w, block), fp8))
    for bits in (4, 8):
        for name, symmetric in (("symmetric", True), ("with zero points", False)):
            given = lambda w, bits=bits, symmetric=symmetric: (w, 128, bits, symmetric)  # noqa: E731
            outputs = groups[:2] if symmetric else groups
            cases.append(Case(f"int{bits}, groups of 128, {name}", "quantize_groups", given, outputs))
    cases.append(Case("mxfp4", "quantize_mxfp4", lambda w: (w,), fp8))
    cases.append(Case("second level, blocks of 256", "quantize_blockwise", second_level, four, their_second_level))
    cases += [Case(f"dequantize {kind}", "dequantize_4bit", packed(kind), (), their_dequantized, parameters=2)
              for kind in ("nf4", "fp4")]  # fmt: skip
    return cases


def tensors_of(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [each for each in results if each is not None]


def equal(ours: Any, theirs: Any) -> bool:
    """Compares bit for bit, except for the payload of a NaN."""
    pairs = list(zip(tensors_of(ours), tensors_of(theirs), strict=True))
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
        return False
    for a, b in pairs:
        same = (a.contiguous().view(torch.uint8) == b.contiguous().view(torch.uint8)).view(-1, a.element_size()).all(1)
        if a.dtype.is_floating_point:
            same |= (a.float().isnan() & b.float().isnan()).view(-1)
        if not same.all():
            return False
    return True


@dataclass
class Contestants:
    """The calls of one case, and the number of their parameters; `equal` is about bitsandbytes' results."""

    calls: dict[str, Callable[[], Any]]
    parameters: int
    equal: bool | None


def in_place(module: Any, case: Case, arguments: tuple[Any, ...]) -> Callable[[], Any]:
    """Returns the call with existing outputs."""
    function = getattr(module, case.function)
    results = function(*arguments)
    made = dict(zip(case.outputs, tensors_of(results), strict=False)) if case.outputs else {}
    return lambda: function(*arguments, **made)


def prepare(case: Case, weight: Tensor) -> Contestants:
    """Returns all contestants of a case; ends the benchmark if ours is not bit-equal to the reference."""
    from distquant.kernels import cpu, reference

    arguments = case.given(weight)
    ours = getattr(cpu, case.function)(*arguments)
    if not equal(ours, getattr(reference, case.function)(*arguments)):
        sys.exit(f"{case.name}: the result is not the reference's")
    calls = {"ours": in_place(cpu, case, arguments), "reference": in_place(reference, case, arguments)}
    theirs, same = case.theirs, None
    if theirs is not None:
        same = equal(ours, theirs(*arguments))
        calls["bitsandbytes"] = lambda: theirs(*arguments)
    return Contestants(calls, arguments[0].numel() * case.parameters, same)


def measure(contestants: Contestants, runs: int) -> dict[str, list[float]]:
    """Measures parameters per second of each run of each contestant, in turns."""
    rates: dict[str, list[float]] = {name: [] for name in contestants.calls}
    for _ in range(runs):
        for name, call in contestants.calls.items():
            start = time.perf_counter()
            call()
            rates[name].append(contestants.parameters / (time.perf_counter() - start))
    return rates


def row(case: Case, contestants: Contestants, rates: dict[str, list[float]]) -> list[str]:
    median = {name: statistics.median(values) for name, values in rates.items()}
    cells = [case.name, f"{median['ours'] / 1e6:,.0f}"]
    cells.append(f"{min(rates['ours']) / 1e6:,.0f} - {max(rates['ours']) / 1e6:,.0f}")
    for name in ("reference", "bitsandbytes"):
        there = name in median
        cells += [f"{median[name] / 1e6:,.1f}", f"{median['ours'] / median[name]:.1f}"] if there else ["", ""]
    cells.append({None: "", True: "yes", False: "no"}[contestants.equal])
    bar = BARS.get(case.name)
    if bar is None or "bitsandbytes" not in median:
        return [*cells, ""]
    met = "met" if median["ours"] / median["bitsandbytes"] >= bar else "NOT met"
    return [*cells, f"{bar:g}x or more: {met}"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the CPU kernels on one thread.")
    parser.add_argument("--parameters", type=int, default=1 << 24, help="elements of the weight")
    parser.add_argument("--runs", type=int, default=5, help="measurements of each contestant")
    parser.add_argument("--out", help="file to write; default: benchmarks/results/cpu-kernels_HARDWARE_DATE.md")
    arguments = parser.parse_args()
    least = COLUMNS * 128
    if arguments.parameters < least or arguments.parameters % least or arguments.runs < 1:
        parser.error(f"--parameters must be a multiple of {least}, --runs 1 or more")
    try:
        from distquant.kernels import cpu
    except ImportError as error:
        parser.error(str(error))
    load = os.getloadavg()[0]
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(arguments.parameters // COLUMNS, COLUMNS, generator=generator).mul_(0.02).bfloat16()
    rows = []
    for case in cases():
        contestants = prepare(case, weight)
        measure(contestants, 1)
        rows.append(row(case, contestants, measure(contestants, arguments.runs)))
        print(" | ".join(rows[-1]), flush=True)
    heads = ["kernel", "ours, M/s", "range", "reference, M/s", "ours is faster by", "bitsandbytes, M/s"]
    heads += ["ours is faster by", "equal to bitsandbytes", "bar"]
    options = f"--parameters {arguments.parameters} --runs {arguments.runs}"
    parts = [
        f"# CPU kernels, {datetime.date.today().isoformat()}",
        machine(load, PACKAGES),
        f"One thread, instruction set {cpu.isa()}; bfloat16 {list(weight.shape)}.\n"
        f"Command: `python benchmarks/cpu_kernels.py {options}`; {arguments.runs} of each, in turns.",
        table(heads, rows),
        "Millions of parameters a second, medians (of the second level: of absmax values). Every result of ours was\n"
        "first found equal to the reference's, bit for bit. Dequantization makes its output: much of that time is the\n"
        "first write to fresh memory.",
    ]
    write("\n\n".join(parts) + "\n", "cpu-kernels", arguments.out)


if __name__ == "__main__":
    main()
