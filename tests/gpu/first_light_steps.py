"""The steps of `first_light.py`, one to a process: prints a row, `ROW [what, result, figures]`, for each finding."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "models" / "kjv-tiny"
OK, SKIPPED, FAILED = "ok", "skipped", "FAILED"
NONE, FOUR_BIT = "none", ("nf4-dq" if importlib.util.find_spec("bitsandbytes") else "int4")
"""Methods to load much with: as stored, and in 4 bits by the one that is installed."""


@dataclass(frozen=True)
class Run:
    """One run's surroundings."""

    device: torch.device
    out: Path
    scratch: Path
    gigabytes: float
    methods: list[str]
    dry: bool


def row(what: str, result: str, figures: str = "") -> None:
    """Prints a finding, at once: the step may be cut off."""
    print("ROW " + json.dumps([what, result, figures]), flush=True)


def absent(*packages: str) -> str | None:
    """Returns which of these packages are missing, as a row has it."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


# -- steps -------------------------------------------------------------------------------------------------------------


def machine(run: Run) -> None:
    """The device, and what a load tries on it."""
    from first_light_load import copy_rate

    from distquant.accelerator import facts
    from distquant.cli.doctor import device_lines

    for line in device_lines(run.device, facts.capability(run.device)):
        what, _, told = line.partition(": ")
        wrong = "not pinned" in told or "cannot" in told.replace("can be", "")
        row(what, FAILED if wrong else OK, told)
    free = facts.free_memory(run.device)
    row("free memory", OK, "unknown" if free is None else f"{free / 1e9:.1f} GB")
    row("torch", OK, f"{torch.__version__}, process groups {facts.group_backend()}")
    size = 1 << 22 if run.dry else 1 << 28
    for kind, pinned in (("pinned", True), ("pageable", False)):
        row(f"host to device, {kind}", OK, f"{copy_rate(run.device, size, pinned) / 1e9:.1f} GB/s")


def load(run: Run) -> None:
    """A load of some gigabytes in 4 bits, and as it is."""
    from first_light_load import timed_load, write_checkpoint

    start = time.perf_counter()
    folder, size = write_checkpoint(run.scratch / "model", run.gigabytes, run.device, run.dry)
    row("checkpoint written", OK, f"{size / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s")
    for quant in (FOUR_BIT, NONE):
        timed_load(str(TINY), quant, run.device, run.out / "warm.json")  # kernels are compiled, libraries are there
        report = timed_load(str(folder), quant, run.device, run.out / f"trace-{quant}.json")
        stages = ", ".join(f"{stage} {busy:.2f}" for stage, busy in report.stages.items() if busy)
        peaks = ", ".join(f"{one['device']} {(one['peak_bytes'] or 0) / 1e9:.2f} GB" for one in report.devices)
        held = (report.quantized_bytes + report.unquantized_bytes) / 1e9
        row(
            f"load, {quant}",
            OK if report.load_buffer == "pinned" else FAILED,
            f"{report.seconds:.2f} s, {report.bytes_read / report.seconds / 1e9:.2f} GB/s from file to device, peak "
            f"{peaks} of which weights {held:.2f}; buffer {report.load_buffer}; limited by {report.limit}; {stages} s; "
            f"{report.kernel}",
        )


def methods(run: Run) -> None:
    """Bits, logits and tokens of each method against the CPU's."""
    for quant in run.methods or short_names():
        guarded(quant, lambda quant=quant: _one_method(run, quant))


def short_names() -> list[str]:
    """Every short name of the methods that distquant itself loads: the first of each, and then the others."""
    from distquant.quantization.registry import discover

    names = [list(scheme.config_class.short_names) for scheme in discover().values() if not scheme.delegated]
    return [name for of in names for name in of[:1]] + [name for of in names for name in of[1:]]


def guarded(what: str, check: Callable[[], None]) -> None:
    """Runs a check of one among many: what it raises is its own row."""
    from distquant.errors import InputError

    try:
        check()
    except InputError as error:  # not for this machine, or a package is missing
        row(what, SKIPPED, str(error.problems[0])[:200])
    except Exception as error:
        row(what, FAILED, f"{type(error).__name__}: {str(error)[:200]}")


def _one_method(run: Run, quant: str) -> None:
    from first_light_load import CLOSE

    import distquant as dq
    from distquant.loading.loader import load_shard
    from distquant.parallel.comm import SoloComm

    plan = dq.plan(str(TINY), quantization_config=quant, dtype="bfloat16")
    there, here = load_shard(plan, SoloComm(), run.device), load_shard(plan, SoloComm(), "cpu")
    same = dq.fingerprint(there) == dq.fingerprint(here)
    ids = torch.arange(1, 65).view(2, 32)
    with torch.no_grad():
        found, truth = there(ids.to(run.device)).logits.float().cpu(), here(ids).logits.float()
    off = float((found - truth).norm() / truth.norm())
    prompt, new = ids[:1, :8], 8
    tokens = there.generate(prompt.to(run.device), max_new_tokens=new, do_sample=False).cpu()
    equal = int((tokens == here.generate(prompt, max_new_tokens=new, do_sample=False)).sum()) - prompt.shape[1]
    good = same and off < CLOSE and math.isfinite(off) and tokens.shape == (1, prompt.shape[1] + new)
    bits = "bits equal" if same else "BITS DIFFER"
    way = there.distquant.report.forward
    row(quant, OK if good else FAILED, f"{bits}, logits differ by {off:.1e}, {equal} of {new} tokens equal; {way}")


def ranks(run: Run) -> None:
    """Two ranks that share the device, over gloo."""
    from first_light_load import two_ranks

    for quant, result, figures in two_ranks(run, str(TINY), [NONE, FOUR_BIT]):
        row(f"tp=2, {quant}", result, figures)


def kernels(run: Run) -> None:
    """Every Triton kernel against the reference, bit for bit; in a dry run the reference on the device itself."""
    from kernel_cases import cases

    from distquant.kernels import reference

    if run.dry:
        row("Triton's kernels", SKIPPED, "Triton has no simulated device; some cases by the reference instead")
        ops: Any = reference
    elif (reason := absent("triton")) is not None:
        row("Triton's kernels", FAILED, reason)
        return
    else:
        from distquant.kernels import gpu as ops
    groups: dict[str, list[str]] = {}
    for name in cases():
        groups.setdefault(name.split()[0], []).append(name)
    for group, names in groups.items():
        if run.dry and group == "refusals":  # of kernels that take what is on a GPU alone
            continue
        guarded(group, lambda names=names[:1] if run.dry else names, group=group: _cases(run, ops, group, names))


def _cases(run: Run, ops: Any, group: str, names: list[str]) -> None:
    from kernel_cases import cases

    start, known = time.perf_counter(), cases()
    wrong = []
    for name in names:
        try:
            known[name](ops, str(run.device))
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    seconds = f"{time.perf_counter() - start:.1f} s"
    count = f"{len(names) - len(wrong)} of {len(names)} cases equal, {seconds}"
    row(group, FAILED if wrong else OK, f"{count}; {wrong[0][:160]}" if wrong else count)


def tests(run: Run) -> None:
    """The folder's tests, but for the kernels' cases, which are a step of their own."""
    if (reason := absent("pytest", "hypothesis")) is not None:
        row("tests/gpu", SKIPPED, reason)
        return
    from xml.etree import ElementTree

    found = run.out / "tests.xml"
    left_out = "tests/gpu/test_gpu_kernels.py::test_a_kernel_on_the_gpu_is_the_reference"
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "tests/gpu", f"--deselect={left_out}"]
    command += ["-k", "not dry_run", f"--junitxml={found}"]
    done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
    suite = next(ElementTree.parse(found).getroot().iter("testsuite"))
    failed = [case.get("name") for case in suite.iter("testcase") if {each.tag for each in case} & {"failure", "error"}]
    skipped = int(suite.get("skipped", 0))
    count = f"{int(suite.get('tests', 0)) - skipped - len(failed)} passed, {skipped} skipped, {len(failed)} failed"
    row("tests/gpu", OK if done.returncode == 0 else FAILED, f"{count} {', '.join(map(str, failed))}".strip())


def bandwidth(run: Run) -> None:
    """`benchmarks/gpu_kernels.py`: its rows, as they are."""
    target = run.out / "gpu-kernels.md"
    command = [sys.executable, "benchmarks/gpu_kernels.py", "--runs", "20", "--out", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 2 and run.dry:
        row("gpu_kernels.py", SKIPPED, done.stderr.strip())
        return
    if done.returncode != 0:
        row("gpu_kernels.py", FAILED, (done.stderr or done.stdout).strip()[-200:])
        return
    lines = [line.strip("| ").split(" | ") for line in target.read_text().splitlines() if line.startswith("| ")]
    for name, median, _, rate, share, *peer in lines[2:]:
        beside = f", {peer[0].strip()} of bitsandbytes'" if peer and peer[0].strip() else ""
        row(name, OK, f"{rate} GB/s, {share} of the copy{beside}, {median} us")


STEPS: dict[str, Callable[[Run], None]] = {
    step.__name__: step for step in (machine, load, methods, ranks, kernels, tests, bandwidth)
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=list(STEPS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, required=True)
    parser.add_argument("--methods", nargs="*", default=[])
    parser.add_argument("--dry-run", action="store_true")
    asked = parser.parse_args()
    sys.path.insert(1, str(ROOT / "tests"))
    from first_light_load import device_of

    device = device_of(asked.dry_run)
    if device is None:
        row("device", FAILED, "torch finds no accelerator here (--dry-run takes the simulated one)")
        return
    STEPS[asked.step](Run(device, asked.out, asked.scratch, asked.gigabytes, asked.methods, asked.dry_run))


if __name__ == "__main__":
    main()
