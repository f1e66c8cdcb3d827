"""Times loads of a mixture of experts beside those of a dense model and beside transformers with bitsandbytes.

    python benchmarks/experts.py MOE_CHECKPOINT DENSE_CHECKPOINT [--runs 5] [--out FILE]

Both are folders of bf16 models with safetensors files; the mixture's have one tensor for each projection of an expert,
as Mixtral's on the hub. A benchmark of CPUs: GPUs are hidden.

Everything loads in nf4 with double quantization. `load.py` describes the timing: fresh processes, each of which has
loaded a small model of the same kind by the same call, files in the page cache, contestants in turns. bitsandbytes
does not quantize fused experts, so the peer's time is that of a bf16 load, and its model is larger.

At ep=2 every read of a file is recorded, and matched with the tensors (`reads.py`; about a millisecond of the load).
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from checkpoints import describe, drop, reader, shards, tensors, total_bytes
from common import fresh, machine, slug, table, write
from contestants import BNB_NF4, Contestant, Measured
from load import PACKAGES, Runs, bytes_read, memory, seconds_of, verdict
from ranks import one_run
from reads import KINDS, OTHERS

TP, EP = "distquant nf4-dq experts tp=2", "distquant nf4-dq experts ep=2"
DENSE, PEER = "distquant nf4-dq dense tp=2", f"{BNB_NF4} experts"
RATE_BAR = 0.85
"""Bytes per second of the mixture of experts over those of the dense model, at least."""
PLAN_BAR = 0.01
"""Part of the planned bytes by which quantized weights may differ from them."""


@dataclass(frozen=True)
class Row:
    """A contestant and its checkpoint."""

    contestant: Contestant
    path: str


def rows_of(experts: str, dense: str, small: str) -> list[Row]:
    """Returns the rows in the order of their turns; `small` is a small mixture of experts."""
    return [
        Row(Contestant(TP, "distquant", "nf4-dq", 2, small=small), experts),
        Row(Contestant(DENSE, "distquant", "nf4-dq", 2), dense),
        Row(Contestant(EP, "recorded", "nf4-dq", 2, mesh="ep=2", small=small), experts),
        Row(Contestant(PEER, "transformers", "nf4-dq", 1, 2, small=small), experts),
    ]


def save_small(folder: str) -> bool:
    """Writes the small mixture of experts that every process loads first."""
    import torch
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return True


def measure(rows: list[Row], count: int) -> Runs:
    runs: Runs = {row.contestant.name: [] for row in rows}
    for number in range(count):
        for row in rows:
            run = one_run(row.path, row.contestant)
            runs[row.contestant.name].append(run)
            seconds = seconds_of([run])[0]
            print(f"run {number + 1}/{count}  {row.contestant.name:50} {seconds:8.3f} s", flush=True)
    return runs


# -- the page ----------------------------------------------------------------------------------------------------------


def rate(row: Row, runs: Runs) -> float:
    """Returns bytes of the files per second, from the median of the seconds."""
    return total_bytes(row.path) / statistics.median(seconds_of(runs[row.contestant.name]))


def times(rows: list[Row], runs: Runs) -> str:
    dense = next(rate(row, runs) for row in rows if row.contestant.name == DENSE)
    lines = []
    for row in rows:
        contestant, seconds = row.contestant, seconds_of(runs[row.contestant.name])
        ratio = rate(row, runs) / dense
        barred = contestant.name in (TP, EP)
        cells = [
            contestant.name,
            f"{contestant.ranks} x {contestant.threads}",
            f"{total_bytes(row.path) / 1e9:.3f}",
            f"{statistics.median(seconds):.3f}",
            f"{min(seconds):.3f} - {max(seconds):.3f}",
            f"{rate(row, runs) / 1e9:.2f}",
            f"{ratio:.2f}",
            f"{RATE_BAR:.2f} or more" if barred else "",
            verdict(ratio >= RATE_BAR) if barred else "",
        ]
        lines.append(cells)
    heads = ["what", "processes x threads", "files GB", "median s", "range s", "GB/s", "of the dense rate", "bar", ""]
    return table(heads, lines)


def sizes(rows: list[Row], runs: Runs) -> str:
    """Formats the memory of the finished models, all ranks together, relative to the peer's."""

    def total(name: str, figure: str) -> float:
        return statistics.median(sum(getattr(rank, figure) for rank in ranks) for ranks in runs[name])

    lines = []
    for name in (row.contestant.name for row in rows if row.contestant.name != DENSE):
        cells = [f"{total(name, figure) / 1e9:.3f}" for figure in ("held", "own", "memory")]
        lines.append([name, *cells, f"{total(PEER, 'held') / total(name, 'held'):.2f}"])
    heads = ["resident, GB, all processes", "tensors of the model", "own memory", "peak", "times smaller than the peer"]
    return table(heads, lines)


def planned(rows: list[Row], runs: Runs) -> str:
    lines = []
    for row in rows:
        if row.contestant.name == PEER:
            continue
        for number, rank in enumerate(runs[row.contestant.name][0]):
            assert rank.quantized is not None and rank.planned
            ratio = rank.quantized / rank.planned
            cells = [f"{row.contestant.name}, rank {number}", f"{rank.quantized:,}", f"{rank.planned:,}"]
            lines.append([*cells, f"{ratio:.4f}", "1.00 within 1%", verdict(abs(ratio - 1) <= PLAN_BAR)])
    return table(["bytes of quantized weights", "finished", "planned", "ratio", "bar", ""], lines)


def own_reads(path: str, ranks: list[Measured]) -> str:
    """Formats the bytes that each rank of ep read."""
    rows = [
        [f"rank {number}", *(f"{rank.reads[kind]:,}" for kind in KINDS), "0", verdict(rank.reads[OTHERS] == 0)]
        for number, rank in enumerate(ranks)
    ]
    total = sum(sum(rank.reads.values()) for rank in ranks)
    needed = sum(nbytes for _, nbytes in tensors(path).values())
    sums = [f"{sum(rank.reads[kind] for rank in ranks):,}" for kind in KINDS]
    rows.append(["both", *sums, "", f"{total / needed:.4f} of the file's tensors"])
    return table(["bytes read at ep=2", *KINDS, "bar for others' experts", ""], rows)


def page(rows: list[Row], command: str, runs: Runs, load: float, count: int) -> str:
    contestants = [row.contestant for row in rows]
    experts, dense = rows[0].path, next(row.path for row in rows if row.contestant.name == DENSE)
    parts = [
        f"# Loading {Path(experts).name}, a mixture of experts, {datetime.date.today().isoformat()}",
        f"Experts: {describe(experts)}\nDense: {describe(dense)}\n\n{machine(load, PACKAGES)}",
        f"Command: `{command}`; {count} of each, in turns.",
        times(rows, runs),
        sizes(rows, runs),
        planned(rows, runs),
        memory(runs, contestants),
        bytes_read(runs, contestants),
        own_reads(experts, runs[EP][0]),
        "Seconds are medians of those of the slowest rank, from the call of the load to the assembled model;\n"
        "processes started, imports done, process group up, a small model of the same kind loaded, files in the page\n"
        "cache (all read into it anew before the first run). GB/s: bytes of the files by those seconds.\n"
        "The peer keeps experts in bf16: bitsandbytes quantizes no\n"
        "fused experts. Tensors of the model: parameters, buffers and quantization states, what they share counted\n"
        "once; over ep every rank has all dense weights. Own memory: at the end over that before, without mapped\n"
        "files. Peak: resident memory over that before the load, summed over the processes (pages of mapped files\n"
        "count). Planned: what `distquant plan` says. Bytes read at ep=2: every read is written down where the system\n"
        "is asked for it, and laid over the tensors of the headers.",
    ]
    return "\n\n".join(part for part in parts if part is not None) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Times loads of a mixture of experts.")
    parser.add_argument("experts", metavar="MOE_CHECKPOINT", help="folder of a bf16 mixture of experts")
    parser.add_argument("dense", metavar="DENSE_CHECKPOINT", help="folder of a dense bf16 model, about as large")
    parser.add_argument("--runs", type=int, default=5, help="measurements of each contestant")
    parser.add_argument("--out", help="file to write; default: benchmarks/results/WHAT_HARDWARE_DATE.md")
    arguments = parser.parse_args()
    experts, dense = os.path.abspath(arguments.experts), os.path.abspath(arguments.dense)
    for path in (experts, dense):
        if not shards(path) or not os.path.isfile(os.path.join(path, "config.json")):
            parser.error(f"{path} holds no config.json with safetensors files")
    if not any(".experts.0." in name for name in tensors(experts)):
        parser.error(f"{experts} holds no tensors of single experts (...experts.0...)")
    if arguments.runs < 1:
        parser.error("--runs must be 1 or more")
    load = os.getloadavg()[0]
    for path in (experts, dense):
        drop(path)  # pages of files just written are smaller than of files just read, and slower
        reader(path, 2)()
    with tempfile.TemporaryDirectory() as small:
        fresh(save_small, small)
        rows = rows_of(experts, dense, small)
        runs = measure(rows, arguments.runs)
    command = f"python benchmarks/experts.py {Path(experts).name} {Path(dense).name} --runs {arguments.runs}"
    text = page(rows, command, runs, load, arguments.runs)
    write(text, f"experts-{slug(Path(experts).name)}", arguments.out)


if __name__ == "__main__":
    main()
