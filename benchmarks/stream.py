"""Streams a checkpoint in one process and keeps nothing, to measure its speed and its memory over time.

    python benchmarks/stream.py CHECKPOINT [--quant nf4-dq] [--staging 512MiB] [--io auto] [--threads N]
                                [--limit BYTES] [--out FILE]

Planner, reader threads, staging memory and kernels are those of a load; only the last stage differs. It offers every
piece the same memory, which is written again and again, and drops each tensor when it is complete. So a model of any
size streams through a small machine. (Double quantization's second level, 1/64 of the values, is left out.) The
checkpoint may be sparse files of a large model's shape; then the disk delivers zeros at the speed of memory.

Memory is resident anonymous and shared memory (`RssAnon + RssShmem`; the page cache is not in it), sampled 50 times a
second, against that before the stream started, when everything was imported and planned. A benchmark of CPUs.
"""

from __future__ import annotations

import argparse
import bisect
import datetime
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints import describe, shards
from common import machine, memory, slug, table, write

PACKAGES = ("distquant", "torch", "transformers")
INTERVAL = 0.02
"""Seconds between samples of memory."""
SHARES = (0.05, 0.25, 0.5, 0.75, 1.0)
"""Parts of the stream after which the page shows memory."""


def resident() -> int:
    """Returns the bytes of anonymous and shared memory of this process."""
    return memory("RssAnon") + memory("RssShmem")


class Forgetful:
    """A sink with one memory for all tensors: a component's rows overwrite the rows before them."""

    def __init__(self, largest: int):
        self.largest = largest
        self._memory: dict[str, Any] = {}
        self._lock = threading.Lock()

    def gathers(self, row_layout: Any) -> bool:
        """Returns False: nothing here goes to a device."""
        return False

    def direct(self, row_layout: Any, start: int, stop: int) -> Any:
        """Returns flat memory for rows `[start, stop)` of a component."""
        import torch

        with self._lock:
            if row_layout.name not in self._memory:
                self._memory[row_layout.name] = torch.empty(self.largest, dtype=torch.uint8)
            memory = self._memory[row_layout.name]
        return memory[: row_layout.nbytes(start, stop)].view(row_layout.dtype)

    def holds(self, row_layout: Any, start: int, stop: int) -> bool:
        """Returns True: `direct` has memory for any rows."""
        return True

    def place(self, row_layout: Any, values: Any, start: int, stop: int) -> int:
        self.direct(row_layout, start, stop).copy_(values)
        return int(values.nbytes)


@dataclass
class Streamed:
    """The figures of a stream; `samples` are (bytes taken, bytes resident)."""

    seconds: float = 0.0
    tensors: int = 0
    nbytes: int = 0
    direct: int = 0
    parameters: int = 0
    staging: int = 0
    slots: int = 0
    before: int = 0
    limit: str = ""
    busy: dict[str, float] = field(default_factory=dict)
    samples: list[tuple[int, int]] = field(default_factory=list)

    def after(self, share: float) -> int:
        """Returns the resident bytes when that part of the bytes had been taken."""
        index = bisect.bisect_left(self.samples, share * self.nbytes, key=lambda sample: sample[0])
        return self.samples[min(index, len(self.samples) - 1)][1]

    @property
    def peak(self) -> int:
        return max(size for _, size in self.samples)


class Sampler:
    """Takes samples on a separate thread while the stream runs."""

    def __init__(self) -> None:
        self.done = 0
        self.samples: list[tuple[int, int]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def progress(self, done: int, total: int) -> None:
        self.done = done

    def _work(self) -> None:
        while not self._end.wait(INTERVAL):
            self.samples.append((self.done, resident()))

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self.samples.append((self.done, resident()))


def within(tasks: Iterable[Any], limit: int | None) -> list[Any]:
    """Returns the first tasks, up to so many bytes; at least one."""
    streamed: list[Any] = []
    nbytes = 0
    for task in tasks:
        nbytes += sum(read.nbytes for read in task.reads)
        if limit is not None and nbytes > limit and streamed:
            break
        streamed.append(task)
    return streamed


def stream(plan: Any, io: str, limit: int | None, report: Callable[[int, int], None]) -> Streamed:
    import torch

    from distquant.checkpoint import open_checkpoint
    from distquant.kernels.choice import choose
    from distquant.loading.loader import scheme_of
    from distquant.loading.node_tasks import tasks_of
    from distquant.loading.stream.budget import Budget
    from distquant.loading.stream.engine import Engine
    from distquant.loading.stream.files import Files
    from distquant.loading.stream.load_state import LoadState
    from distquant.loading.stream.stage_timer import StageTimer

    checkpoint = open_checkpoint(plan.model)
    device, ops = torch.device("cpu"), choose("auto", torch.device("cpu")).ops
    infos = checkpoint.tensors
    tasks = within(tasks_of(plan, scheme_of(plan), (0,), infos, lambda _: device, lambda _: ops), limit)
    sink = Forgetful(Budget.of(plan.staging, tasks).largest)
    load_state, stages, files = LoadState(600), StageTimer(), Files(checkpoint.path, io)
    streamed = Streamed(tensors=len({task.name for task in tasks}), staging=plan.staging, before=resident())
    streamed.parameters = sum(task.rows.rows * task.rows.width for task in tasks if task.encode is not None)
    sampler = Sampler()

    def progress(done: int, total: int) -> None:
        sampler.progress(done, total)
        report(done, total)

    start = time.perf_counter()
    try:
        with (
            sampler,
            Engine(
                0, tasks, files, plan.staging, load_state, stages, lambda _: sink, lambda *_: None, progress
            ) as engine,
        ):
            engine.start()
            engine.run()
            streamed.seconds = time.perf_counter() - start
            streamed.slots = engine.staging_buffer.slot_bytes * engine.staging_buffer.slots
    finally:
        files.close()
    streamed.nbytes, streamed.direct, streamed.samples = sampler.done, files.stats.direct, sampler.samples
    streamed.busy, streamed.limit = dict(stages.busy), stages.limit(streamed.seconds)
    return streamed


def page(path: str, command: str, streamed: Streamed, load: float, threads: int) -> str:
    mebi = 1 << 20
    busy = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in streamed.busy.items())
    rows = [["at the start", f"{streamed.before / mebi:.1f}", "0.0"]]
    points = [(f"after {share:.0%}", streamed.after(share)) for share in SHARES]
    for name, size in (*points, ("peak", streamed.peak)):
        rows.append([name, f"{size / mebi:.1f}", f"{(size - streamed.before) / mebi:.1f}"])
    flat = max(size for _, size in points) - min(size for _, size in points)
    figures = [
        ["tensors", f"{streamed.tensors:,}"],
        ["bytes", f"{streamed.nbytes:,}"],
        ["of them past the page cache", f"{streamed.direct:,}"],
        ["parameters quantized", f"{streamed.parameters:,}"],
        ["seconds", f"{streamed.seconds:.2f}"],
        ["GB/s", f"{streamed.nbytes / streamed.seconds / 1e9:.2f}"],
        ["M parameters/s", f"{streamed.parameters / streamed.seconds / 1e6:,.0f}"],
    ]
    parts = [
        f"# Streaming {Path(path).name}, {datetime.date.today().isoformat()}",
        f"{describe(path)}\n\n{machine(load, PACKAGES)}",
        f"Command: `{command}`; one process, {threads} threads to quantize, 2 to read.",
        table(["what", "value"], figures),
        f"Busy: {busy}; limited by {streamed.limit}.",
        table(["resident memory", "MiB", "over the start, MiB"], rows),
        f"Staging budget {streamed.staging / mebi:.0f} MiB, of which slots take {streamed.slots / mebi:.0f} MiB. "
        f"Between {SHARES[0]:.0%} and {SHARES[-1]:.0%} of the stream\n"
        f"memory differs by {flat / mebi:.1f} MiB; the peak of {len(streamed.samples):,} samples lies "
        f"{(streamed.peak - streamed.before) / mebi:.1f} MiB over the start.",
        "Resident memory is anonymous and shared memory; the page cache is not in it. Every tensor was read,\n"
        "quantized and dropped: the last stage wrote each piece over the one before it, and double quantization's\n"
        "second level was left out.",
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Streams a checkpoint and keeps nothing.")
    parser.add_argument("checkpoint", help="folder of a model with safetensors files, sparse ones do")
    parser.add_argument("--quant", default="nf4-dq", choices=("nf4-dq", "int8", "none"))
    parser.add_argument("--staging", default="512MiB", help="bytes that weights may pass through")
    parser.add_argument("--io", default="auto", choices=("auto", "buffered", "direct"))
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads that quantize")
    parser.add_argument("--limit", type=int, metavar="BYTES", help="only the first tensors, up to so many bytes")
    parser.add_argument("--out", help="file to write; default: benchmarks/results/stream-WHAT_HARDWARE_DATE.md")
    arguments = parser.parse_args()
    path = os.path.abspath(arguments.checkpoint)
    if not shards(path) or not os.path.isfile(os.path.join(path, "config.json")):
        parser.error(f"{path} holds no config.json with safetensors files")
    if arguments.threads < 1 or (arguments.limit is not None and arguments.limit < 1):
        parser.error("--threads and --limit must be 1 or more")
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}  # before torch comes

    import torch

    import distquant

    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0]
    try:
        plan = distquant.plan(path, quantization_config=arguments.quant, mesh="tp=1", staging=arguments.staging)
        streamed = stream(plan, arguments.io, arguments.limit, teller())
    except distquant.InputError as error:
        parser.error(str(error))
    options = f"--quant {arguments.quant} --staging {arguments.staging} --io {arguments.io}"
    options += f" --limit {arguments.limit}" if arguments.limit else ""
    command = f"python benchmarks/stream.py {Path(path).name} {options} --threads {arguments.threads}"
    subject = f"stream-{slug(Path(path).name)}-{arguments.quant}"
    write(page(path, command, streamed, load, arguments.threads), subject, arguments.out)


def teller() -> Callable[[int, int], None]:
    """Prints a line every 10%."""
    reported, start = [0], time.perf_counter()

    def report(done: int, total: int) -> None:
        tenth = 10 * done // max(total, 1)
        if tenth > reported[0]:
            reported[0] = tenth
            print(f"{10 * tenth:3}%  {done / 1e9:8.2f} GB  {time.perf_counter() - start:8.1f} s", flush=True)

    return report


if __name__ == "__main__":
    main()
