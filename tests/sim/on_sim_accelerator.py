"""What tests of the accelerator's facts do where `sim` is a device; called by name, as in `on_sim`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from on_sim import PLACES, differing, faults

import distquant as dq
from distquant.accelerator import facts, host_memory, names
from distquant.errors import InputError
from distquant.loading import loader
from distquant.loading.loader import load_shard
from distquant.loading.stream.copier import Copier
from distquant.loading.stream.files import Files
from distquant.parallel.comm import SoloComm

ENOUGH = 2
"""CUDA's number of the error that there is not enough memory."""


class FullRuntime:
    """A runtime that registers no memory, and like CUDA's keeps its error until someone asks."""

    def __init__(self) -> None:
        self.error, self.releases = 0, 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.error = ENOUGH
        return ENOUGH

    def cudaHostUnregister(self, address: int) -> int:
        self.releases += 1
        return 0

    def cudaGetLastError(self) -> int:
        error, self.error = self.error, 0
        return error


@contextmanager
def full() -> Iterator[FullRuntime]:
    runtime = FullRuntime()
    with mock.patch.object(torch.get_device_module("sim"), "cudart", lambda: runtime):
        yield runtime


def not_pinned(path: str) -> dict[str, Any]:
    """A load onto two devices that register no host memory, its report, and doctor's word."""
    from distquant.cli.doctor import device_lines
    from distquant.runtime.query import Query, perform

    plan = dq.plan(path, quantization_config="nf4-dq", device_map=PLACES, staging="128KiB")
    on_cpu = load_shard(dq.plan(path, quantization_config="nf4-dq", staging="128KiB"), SoloComm(), "cpu")
    with full() as runtime:
        model = load_shard(plan, SoloComm(), "sim:0")
        left = runtime.error
        lines = device_lines(facts.own_device(), None)
    outcome = perform(model, Query(fingerprint=False), "local")
    return {
        "differing": differing(model, on_cpu),
        "error left behind": (left, runtime.error),
        "unregistered": runtime.releases,
        "load_buffer": model.distquant.report.load_buffer,
        "notes": [note for note in outcome.notes if "load buffer" in note],
        "doctor": lines,
        "faults": faults(),
    }


def facts_of_devices(path: str) -> dict[str, Any]:
    """The report of a load by device map, and what doctor says of a device that registers."""
    import _sim

    from distquant.cli.doctor import device_lines

    plan = dq.plan(path, quantization_config="none", device_map=PLACES, staging="128KiB")
    before = [torch.empty(1 << 26, dtype=torch.uint8, device=f"sim:{number}") for number in range(2)]
    del before  # a peak of others, before the load
    model = load_shard(plan, SoloComm(), "sim:0")
    held = dict.fromkeys(("sim:0", "sim:1"), 0)
    for value in {value.data_ptr(): value for value in (*model.parameters(), *model.buffers())}.values():
        held[str(value.device)] += value.nbytes
    report = model.distquant.report
    return {
        "devices": report.devices, "highest": report.peak_device_bytes, "held": held,
        "load_buffer": report.load_buffer, "doctor": device_lines(facts.own_device(), None),
        "registered": len(_sim.registered()), "backend": facts.group_backend(),
        "free": (facts.free_memory(torch.device("sim:1")) or 0) > 0, "capability": facts.capability(facts.own_device()),
    }  # fmt: skip


def without_a_number(path: str) -> dict[str, Any]:
    """A load onto `sim`, while its second device is the current one; and plans that give numbers alone."""
    torch.accelerator.set_device_index(1)
    try:
        model = load_shard(dq.plan(path, quantization_config="none"), SoloComm(), "sim")
        report = model.distquant.report
        local = dq.load(path, quantization_config="none")
    finally:
        torch.accelerator.set_device_index(0)
    numbered = dq.load(path, quantization_config="none", device_map={"": 1})
    return {
        "devices": sorted({str(value.device) for value in (*model.parameters(), *model.buffers())}),
        "report": [one["device"] for one in report.devices],
        "local": str(next(local.parameters()).device),
        "numbered": str(next(numbered.parameters()).device),
    }


def seconds_end_with_the_devices(path: str) -> list[bool]:
    """Whether each device's stream is empty when a load takes its figures, with work of 50 ms put there at its end."""
    import _sim

    complete, report = loader._Loading._complete, loader._Loading._fill_report
    empty: list[bool] = []

    def and_work(self: Any, *given: Any) -> None:
        complete(self, *given)
        for number in range(2):
            _sim.enqueue(number, lambda: time.sleep(0.05))

    def looked_at(self: Any, files: Files) -> None:
        empty.extend(torch.accelerator.current_stream(f"sim:{number}").query() for number in range(2))
        report(self, files)

    plan = dq.plan(path, quantization_config="none", device_map=PLACES, staging="128KiB")
    with mock.patch.multiple(loader._Loading, _complete=and_work, _fill_report=looked_at):
        load_shard(plan, SoloComm(), "sim:0")
    return empty


def triton_where_it_cannot_run(path: str, quant: str) -> dict[str, Any]:
    """A load that would take Triton's kernels for `sim`, for which Triton has no driver; and if it came to reading."""
    files = mock.patch.object(loader, "Files", side_effect=Files)
    with mock.patch.object(names, "CUDA", "sim"), files as opened:
        try:
            load_shard(dq.plan(path, quantization_config=quant), SoloComm(), "sim:0")
            raised = []
        except InputError as error:
            raised = [(problem.where, problem.what, problem.fix) for problem in error.problems]
    return {"raised": raised, "opened": opened.called}


def close_that_raises(path: str) -> dict[str, Any]:
    """A load that fails on a device which then fails at every question; what is left of it."""
    import _sim

    before = {thread.name for thread in threading.enumerate()}
    plan = dq.plan(path, quantization_config="none", device_map=PLACES, staging="128KiB")

    def progress(seen: Any) -> None:
        if seen.done > 0.5 * seen.total:
            raise KeyboardInterrupt

    def broken(self: Copier, until: float) -> bool:
        raise RuntimeError("the device is lost")

    with mock.patch.object(Copier, "close", broken):
        try:
            load_shard(plan, SoloComm(), "sim:0", progress=progress)
            raised = None
        except BaseException as error:
            raised = type(error).__name__
    for number in range(2):
        torch.accelerator.synchronize(f"sim:{number}")
    kept = len(_sim.registered())
    for address in _sim.registered():
        _sim.host_unregister(address)
    threads = {thread.name for thread in threading.enumerate()} - before
    return {"raised": raised, "threads": sorted(threads), "kept": kept}


def trial_of_registration() -> list[str]:
    """What a trial says where memory can be registered, where not, and where a backend has no function for it."""
    import _sim

    good = host_memory.trial(torch.device("sim:0"))
    with full() as runtime:
        bad = host_memory.trial(torch.device("sim:0"))
    module = torch.get_device_module("sim")
    cudart = module.cudart
    del module.cudart
    try:
        none = host_memory.trial(torch.device("sim:0"))
    finally:
        module.cudart = cudart
    return [good, bad, none, str(runtime.error), str(len(_sim.registered()))]
