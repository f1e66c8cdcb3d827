"""Times loads by distquant and by what users would take instead, in alternation, and writes a table.

    python benchmarks/load.py CHECKPOINT [--runs 5] [--only nf4 ...] [--out FILE]

CHECKPOINT is a folder of a bf16 model with safetensors files. A benchmark of CPUs: GPUs are hidden.

What is timed: from the call of the load to the assembled model, every byte of its parameters read once. Each
measurement has fresh processes. They have imported everything, joined their process group and, by the same call,
loaded the small example model before the clock starts; the checkpoint's files have just been read, so they lie in the
page cache where it has room. The seconds of a run are those of its slowest rank. Contestants take turns
(A B C A B C ...), so that a slow minute of the machine meets all of them.
"""

from __future__ import annotations

import argparse
import datetime
import glob
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SMALL = ROOT / "examples" / "models" / "kjv-tiny"
PACKAGES = ("distquant", "torch", "transformers", "bitsandbytes", "accelerate", "safetensors")
CHUNK = 8 << 20
TIMEOUT = 1800
"""Seconds until a measurement is given up."""


@dataclass(frozen=True)
class Contestant:
    """One row of the table; `against` names the row of the peer that does the same."""

    name: str
    system: str
    quant: str
    ranks: int
    threads: int
    against: str = ""


BNB_NF4, BNB_INT8 = "transformers + bitsandbytes nf4-dq", "transformers + bitsandbytes int8"
HF_TP = "transformers bf16 tp=2"
CONTESTANTS = (
    Contestant("distquant nf4-dq tp=2", "distquant", "nf4-dq", 2, 1, BNB_NF4),
    Contestant("distquant nf4-dq tp=1", "distquant", "nf4-dq", 1, 2, BNB_NF4),
    Contestant(BNB_NF4, "transformers", "nf4-dq", 1, 2),
    Contestant("distquant int8 tp=2", "distquant", "int8", 2, 1, BNB_INT8),
    Contestant(BNB_INT8, "transformers", "int8", 1, 2),
    Contestant("distquant bf16 tp=2", "distquant", "none", 2, 1, HF_TP),
    Contestant(HF_TP, "transformers", "none", 2, 1),
    Contestant("preadv of the bytes, 2 threads", "preadv", "", 1, 2),
    Contestant("first write to as much fresh memory, 2 processes", "fresh", "", 2, 1),
)


@dataclass(frozen=True)
class Measured:
    """One rank's figures: seconds, and bytes of memory over the baseline and read from files (None: not known)."""

    seconds: float
    memory: int
    read: int | None


# -- in the measured processes -----------------------------------------------------------------------------------------


def load_distquant(path: str, contestant: Contestant) -> tuple[Any, int | None]:
    import distquant as dq

    mesh = f"tp={contestant.ranks}"
    model = dq.load(path, quantization_config=contestant.quant, mesh=mesh, dtype="bfloat16")
    return model, model.distquant.report.bytes_read


def load_transformers(path: str, contestant: Contestant) -> tuple[Any, int | None]:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if contestant.ranks > 1:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(tp_size=contestant.ranks)
    else:
        options["device_map"] = "cpu"
    if contestant.quant == "nf4-dq":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    elif contestant.quant == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(path, **options), None


def read_bytes(path: str, contestant: Contestant) -> tuple[Any, int | None]:
    """The floor: all bytes of all files into one small buffer a thread, and nothing done with them."""
    files = shards(path)
    counts = [0] * contestant.threads
    step = sum(map(os.path.getsize, files)) // contestant.threads + 1

    def read(index: int) -> None:
        buffer, skip, left = memoryview(bytearray(CHUNK)), index * step, step
        for file in files:
            size = os.path.getsize(file)
            descriptor = os.open(file, os.O_RDONLY)
            while left and skip < size:
                count = os.preadv(descriptor, [buffer[: min(CHUNK, left)]], skip)
                skip, left, counts[index] = skip + count, left - count, counts[index] + count
            skip = max(skip - size, 0)
            os.close(descriptor)

    workers = [threading.Thread(target=read, args=(index,)) for index in range(contestant.threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return None, sum(counts)


def write_fresh(path: str, contestant: Contestant) -> tuple[Any, int | None]:
    """The other floor: this rank's share of the bytes written once to new memory, in parts as large as weights are."""
    import torch

    from distquant import hostmem

    share = sum(map(os.path.getsize, shards(path))) // contestant.ranks
    kept = [hostmem.empty(2 * CHUNK, torch.uint8).fill_(1) for _ in range(share // (2 * CHUNK))]
    del kept
    return None, None


LOADERS: dict[str, Callable[[str, Contestant], tuple[Any, int | None]]] = {
    "distquant": load_distquant,
    "transformers": load_transformers,
    "preadv": read_bytes,
    "fresh": write_fresh,
}


def touch(model: Any) -> None:
    """Reads every byte of the parameters once: what was only mapped into memory is then really there."""
    if model is None:
        return
    import torch

    for parameter in model.parameters():
        local = getattr(parameter, "to_local", lambda p=parameter: p.data)()
        words = local.reshape(-1).view(torch.uint8)
        aligned = words.numel() // 8 * 8
        words[:aligned].view(torch.int64).sum()


def status(key: str) -> int:
    """A field of this process's `/proc` status, in bytes."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{key}:\s+(\d+) kB$", text, re.M)
    assert found is not None
    return int(found.group(1)) * 1024


def measure(path: str, contestant: Contestant, rank: int, url: str) -> Measured:
    if contestant.system == "preadv":
        return timed(path, contestant, lambda: None)
    import logging

    import torch

    torch.set_num_threads(contestant.threads)
    logging.disable(logging.WARNING)
    if contestant.ranks == 1:
        LOADERS[contestant.system](str(SMALL), contestant)
        return timed(path, contestant, lambda: None)
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=contestant.ranks)
    try:
        LOADERS[contestant.system](str(SMALL), contestant)
        return timed(path, contestant, dist.barrier)
    finally:
        dist.destroy_process_group()


def timed(path: str, contestant: Contestant, barrier: Callable[[], object]) -> Measured:
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    barrier()
    start = time.perf_counter()
    model, read = LOADERS[contestant.system](path, contestant)
    touch(model)
    seconds = time.perf_counter() - start
    barrier()
    return Measured(seconds, status("VmHWM") - before, read)


def rank_main(pipe: Any, path: str, contestant: Contestant, rank: int, port: int) -> None:
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(contestant.threads), "HF_HUB_OFFLINE": "1"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    if contestant.ranks > 1:
        ranks = str(contestant.ranks)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        pipe.send(measure(path, contestant, rank, f"tcp://127.0.0.1:{port}"))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


# -- in the process that keeps the score -------------------------------------------------------------------------------


def shards(path: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(path), "*.safetensors")))


def one_run(path: str, contestant: Contestant) -> list[Measured]:
    """Every rank's figures, by fresh processes."""
    read_bytes(path, CONTESTANTS[-1])
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, pipes = [], []
    for rank in range(contestant.ranks):
        ours, theirs = context.Pipe()
        process = context.Process(target=rank_main, args=(theirs, path, contestant, rank, port), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    found = []
    try:
        for rank, pipe in enumerate(pipes):
            answer = pipe.recv() if pipe.poll(TIMEOUT) else f"no answer within {TIMEOUT} s"
            if isinstance(answer, str):
                sys.exit(f"{contestant.name}, rank {rank}: {answer}")
            found.append(answer)
    except EOFError:
        sys.exit(f"{contestant.name}: a rank died")
    finally:
        for process in processes:
            process.join(0 if len(found) < len(processes) else 30)
            process.kill()
    return found


def summary(runs: list[list[Measured]]) -> dict[str, Any]:
    seconds = [max(rank.seconds for rank in ranks) for ranks in runs]
    read = [sum(rank.read for rank in ranks if rank.read is not None) for ranks in runs if ranks[0].read is not None]
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "memory": statistics.median(sum(rank.memory for rank in ranks) for ranks in runs),
        "read": statistics.median(read) if read else None,
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(path: str, command: str, runs: int, results: dict[str, dict[str, Any]], load: float) -> str:
    size = sum(map(os.path.getsize, shards(path)))
    chosen = [c for c in CONTESTANTS if c.name in results]
    rows, ratios = [], []
    for contestant in chosen:
        found = results[contestant.name]
        rows.append(
            [
                contestant.name,
                f"{contestant.ranks} x {contestant.threads}",
                f"{found['seconds']:.2f}",
                f"{found['fastest']:.2f} - {found['slowest']:.2f}",
                f"{size / found['seconds'] / 1e9:.2f}",
                f"{found['memory'] / 1e9:.2f}",
                f"{found['read'] / 1e9:.3f}" if found["read"] is not None else "",
            ]
        )
        for other in (contestant.against, CONTESTANTS[-1].name if contestant.against else ""):
            if other in results:
                ratio = found["seconds"] / results[other]["seconds"]
                ratios.append([contestant.name, other, f"{ratio:.2f}", f"{1 / ratio:.2f}"])
    heads = ["what", "processes x threads", "median s", "range s", "GB/s", "peak memory GB", "read GB"]
    parts = [
        f"# Loading {Path(path).name}, {datetime.date.today().isoformat()}",
        f"{describe(path, size)}\n\n{machine(load)}",
        f"Command: `{command}`; {runs} of each, in turns.",
        table(heads, rows),
    ]
    if ratios:
        parts.append(table(["A", "B", "time of A / time of B", "A is faster by"], ratios))
    parts.append(
        "Seconds are those of the slowest rank, from the call of the load to the assembled model with every byte of\n"
        "its parameters read once; processes started, imports done, process group up, files in the page cache. GB/s:\n"
        "bytes of the files by those seconds. Peak memory: resident memory over that before the load, summed over the\n"
        "processes (pages of mapped files count). Read: what distquant reports, and what the last row counts."
    )
    return "\n\n".join(parts) + "\n"


def describe(path: str, size: int) -> str:
    config = json.loads((Path(path) / "config.json").read_text())
    parameters = 0
    for file in shards(path):
        with open(file, "rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        parameters += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    known = ", ".join(f"{name} {config[name]}" for name in (*fields, "vocab_size") if name in config)
    what = f"{config.get('architectures', ['?'])[0]}, {parameters / 1e9:.2f} B parameters"
    return f"{what}, {size / 1e9:.2f} GB in {len(shards(path))} files ({known})."


def machine(load: float) -> str:
    with open("/proc/meminfo") as file:
        memory = int(file.readline().split()[1]) * 1024
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return (
        f"{cpu()}, {os.cpu_count()} cores, {memory / 1e9:.0f} GB, no GPU used; load average before: {load:.2f}.\n"
        f"Python {platform.python_version()}, {versions} (commit {revision.stdout.strip() or 'unknown'})."
    )


def cpu() -> str:
    names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    return names[0].strip() if names else platform.machine()


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def main() -> None:
    parser = argparse.ArgumentParser(description="Times loads by distquant and its peers.")
    parser.add_argument("checkpoint", help="folder of a bf16 model")
    parser.add_argument("--runs", type=int, default=5, help="measurements of each contestant")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only contestants whose names contain one of these")
    parser.add_argument("--out", help="file to write; default: benchmarks/results/WHAT_HARDWARE_DATE.md")
    arguments = parser.parse_args()
    path = os.path.abspath(arguments.checkpoint)
    if not shards(path) or arguments.runs < 1:
        parser.error(f"{path} holds no safetensors files" if not shards(path) else "--runs must be 1 or more")
    wanted = [c for c in CONTESTANTS if not arguments.only or any(text in c.name for text in arguments.only)]
    if not wanted:
        parser.error(f"--only matches none of: {', '.join(c.name for c in CONTESTANTS)}")
    load = os.getloadavg()[0]
    runs: dict[str, list[list[Measured]]] = {contestant.name: [] for contestant in wanted}
    for number in range(arguments.runs):
        for contestant in wanted:
            found = one_run(path, contestant)
            runs[contestant.name].append(found)
            seconds = max(rank.seconds for rank in found)
            print(f"run {number + 1}/{arguments.runs}  {contestant.name:40} {seconds:8.2f} s", flush=True)
    options = f" --runs {arguments.runs}" + (f" --only {' '.join(arguments.only)}" if arguments.only else "")
    command = f"python benchmarks/load.py {Path(path).name}{options}"
    text = page(path, command, arguments.runs, {name: summary(found) for name, found in runs.items()}, load)
    name = f"load-{slug(Path(path).name)}_{slug(cpu())}-{os.cpu_count()}c_{datetime.date.today().isoformat()}.md"
    target = Path(arguments.out) if arguments.out else ROOT / "benchmarks" / "results" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    print(f"\n{text}\nwritten to {target}")


if __name__ == "__main__":
    main()
