"""Measures the quality of every method, and the speed of its loads beside the library that it comes from.

    python benchmarks/methods.py quality MODEL --text FILE [--only nf4 hqq ...] [--out FILE]
    python benchmarks/methods.py speed CHECKPOINT [--runs 5] [--only nf4 stored:nf4 ...] [--work FOLDER] [--out FILE]

MODEL and CHECKPOINT are folders of a bf16 model with safetensors files. A benchmark of CPUs: GPUs are hidden.

`quality` quantizes the model on the fly with every method that can run here, at tp=1 and tp=2, and writes the table of
docs/quality.md (with `--out`, a page). It exits with 1 if a method failed or its fingerprints differ.

`speed` times loads of distquant (tp=1 with a thread for each core, and tp=2 with the same threads divided) and of the
method's own library ("upstream"), in alternation (A B C A B C ...). Each load has fresh processes that have loaded the
small example model by the same call, and the files are in the page cache. A method's name quantizes CHECKPOINT on the
way; `stored:METHOD` loads a checkpoint that the library quantized and saved, once, below the folder of `--work`. The
page has a line for each method: median seconds, distquant's divided by upstream's, and peak memory. For stored
checkpoints it also has the seconds of only copying their bytes into memory. The command, the machine and all versions
are listed. It exits with 1 if distquant failed and the library did not.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import shlex
import statistics
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

from checkpoints import describe, shards
from common import ROOT, SMALL, machine, slug, table, write
from contestants import Contestant, Measured
from load import gigabytes, seconds_of, verdict
from method_ranks import LOADS, Quality, Ranks
from peers import PEERS, STORED, WITHOUT, store
from ranks import one_run

BEGIN, END = "<!-- quality: begin -->", "<!-- quality: end -->"
"""The lines of docs/quality.md between which the table is written."""
DOCUMENT = ROOT / "docs" / "quality.md"
PACKAGES = (
    "distquant", "torch", "transformers", "accelerate", "bitsandbytes", "compressed-tensors", "torchao",
    "optimum-quanto", "hqq",
)  # fmt: skip


def about(path: str, load: float) -> str:
    """Describes model, machine, versions and kernels."""
    installed = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    known = tuple(name for name in PACKAGES if name in installed)
    return f"{describe(path)}\n\n{machine(load, known)}\nKernels of distquant: {kernels()}."


def kernels() -> str:
    """Describes the kernels that `auto` takes here: seconds depend on them."""
    import torch

    from distquant.kernels.choice import choose

    return choose("auto", torch.device("cpu")).reason.partition(",")[0]


def today() -> str:
    return datetime.date.today().isoformat()


# -- quality -----------------------------------------------------------------------------------------------------------


def plannable(path: str, only: list[str] | None) -> tuple[list[str], dict[str, str]]:
    """Returns short names of the methods that can run here, and of the others with the reason why not."""
    import distquant as dq
    from distquant.errors import InputError
    from distquant.quantization.registry import config_classes

    names = [name for kind in config_classes() for name in kind.short_names]
    refuse_unknown(only, names)
    able, unable = [], {}
    for name in [name for name in names if not only or name in only]:
        try:
            for mesh in ("tp=1", "tp=2"):
                dq.plan(path, quantization_config=name, mesh=mesh, dtype="bfloat16")
            able.append(name)
        except InputError as error:
            first, more = error.problems[0], len(error.problems) - 1
            unable[name] = f"{first.where}: {first.what}" + (f" (and {more} more)" if more else "")
    return able, unable


@dataclass(frozen=True)
class Both:
    """A method at tp=1 and tp=2; the error's text if it failed."""

    name: str
    tp1: list[Quality] | str
    tp2: list[Quality] | str

    @property
    def good(self) -> bool:
        return "equal" in self.cells()

    def cells(self) -> list[str]:
        widths = (self.tp1, self.tp2)
        failures = [f"tp={tp}: {ranks}" for tp, ranks in enumerate(widths, 1) if isinstance(ranks, str)]
        if failures:
            return [self.name, "FAILED, see below", *[""] * 8]
        tp1, tp2 = ([rank for rank in ranks if isinstance(rank, Quality)] for ranks in widths)
        prints = {rank.fingerprint for rank in (*tp1, *tp2)}
        bits = 8 * tp1[0].quantized_bytes / tp1[0].parameters if tp1[0].parameters else 16
        return [
            self.name,
            f"{bits:.2f}",
            *(f"{ranks[0].perplexity:.3f}" for ranks in (tp1, tp2)),
            f"`{tp1[0].fingerprint[:8]}`",
            "equal" if len(prints) == 1 else "DIFFERS",
            *(f"{median_load(ranks):.2f}" for ranks in (tp1, tp2)),
            *(f"{max(rank.beyond for rank in ranks) / 2**20:.0f}" for ranks in (tp1, tp2)),
        ]

    @property
    def failure(self) -> str | None:
        failures = [f"tp={tp}: {one}" for tp, one in enumerate((self.tp1, self.tp2), 1) if isinstance(one, str)]
        return f"`{self.name}` FAILED: {'; '.join(failures)}" if failures else None


def median_load(ranks: list[Quality]) -> float:
    return statistics.median(max(seconds) for seconds in zip(*(rank.seconds for rank in ranks), strict=True))


def quality_text(path: str, command: str, results: list[Both], unable: dict[str, str], load: float) -> str:
    heads = ["method", "bits per weight", "perplexity tp=1", "tp=2", "fingerprint", "tp=1 and tp=2", "load s tp=1"]
    heads += ["tp=2", "peak beyond the shard MiB tp=1", "tp=2"]
    parts = [
        f"{Path(path).name}: {about(path, load)}",
        f"Command, on {today()}: `{command}`; loads: the median of {LOADS}.",
        table(heads, [both.cells() for both in results]),
    ]
    failures = [f"- {both.failure}" for both in results if both.failure]
    parts += ["\n".join(failures)] if failures else []
    if unable:
        parts.append("Not run:\n\n" + "\n".join(f"- `{name}`: {reason}" for name, reason in unable.items()))
    return "\n\n".join(parts) + "\n"


def quality(arguments: argparse.Namespace) -> int:
    path, text = os.path.abspath(arguments.model), Path(arguments.text).read_text()
    load = os.getloadavg()[0]
    able, unable = plannable(path, arguments.only)
    ranks, results = Ranks(), []
    try:
        for name in able:
            both = Both(name, ranks.measure(path, name, 1, text), ranks.measure(path, name, 2, text))
            print("  ".join(both.cells()), flush=True)
            results.append(both)
    finally:
        ranks.close()
    only = f" --only {shlex.join(arguments.only)}" if arguments.only else ""
    command = f"python benchmarks/methods.py quality {Path(path).name} --text {Path(arguments.text).name}{only}"
    written = quality_text(path, command, results, unable, load)
    if arguments.out:
        write(f"# What quantization costs, {today()}\n\n{written}", "quality", arguments.out)
    else:
        fill(DOCUMENT, written)
    return 0 if all(both.good for both in results) else 1


def fill(document: Path, text: str) -> None:
    """Replaces the text between the two marks of a document."""
    before, begin, rest = document.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{document} has no lines {BEGIN!r} and {END!r}; write to another file with --out")
    document.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")
    print(f"\n{text}\nwritten to {document}")


# -- speed -------------------------------------------------------------------------------------------------------------

STORED_PREFIX = "stored:"
NAMES = (*(name for name in PEERS if not name.startswith("stored")), *(STORED_PREFIX + name for name in STORED))


@dataclass(frozen=True)
class Match:
    """distquant at two widths and the library, over one checkpoint; and the minimum for any loader."""

    name: str
    path: str
    how: str
    contestants: tuple[Contestant, Contestant, Contestant]
    copying: Contestant | None
    """The floor of a stored checkpoint: its bytes are only read into memory."""

    @property
    def all(self) -> tuple[Contestant, ...]:
        return self.contestants if self.copying is None else (*self.contestants, self.copying)


def match(name: str, path: str, work: str) -> Match:
    """Returns the contestants under a name of `NAMES`; makes the stored checkpoints that they need."""
    cores = os.cpu_count() or 1
    stored = name.startswith(STORED_PREFIX)
    method = name.removeprefix(STORED_PREFIX)
    small = ""
    quant, peer = method, method
    if stored:
        quant, peer = "", "stored quanto" if method.startswith("quanto") else "stored"
        path, small = store(path, method, work), store(str(SMALL), method, work)
    ours = [
        Contestant(f"{name} distquant tp={tp}", "distquant", quant, tp, max(1, cores // tp), small=small)
        for tp in (1, 2)
    ]
    theirs = Contestant(f"{name} upstream", "upstream", quant, 1, cores, peer=peer, small=small)
    copying = Contestant(f"{name} copying", "copy", quant, 1, cores, small=small) if stored else None
    return Match(name, path, PEERS[peer].how, (ours[0], ours[1], theirs), copying)


Runs = dict[str, list[list[Measured]]]
"""Figures of every rank of every run, by the contestant's name."""


def alternate(matches: list[Match], count: int) -> tuple[Runs, dict[str, str]]:
    """Returns all runs, and the failures of contestants, which are not run again."""
    runs: Runs = {contestant.name: [] for each in matches for contestant in each.all}
    failed: dict[str, str] = {}
    for number in range(count):
        for each in matches:
            for contestant in each.all:
                if contestant.name in failed:
                    continue
                try:
                    run = one_run(each.path, contestant)
                except SystemExit as error:
                    failed[contestant.name] = str(error)
                    print(f"FAILED  {error}", flush=True)
                    continue
                runs[contestant.name].append(run)
                seconds = seconds_of([run])[0]
                print(f"run {number + 1}/{count}  {contestant.name:40} {seconds:8.3f} s", flush=True)
    return runs, failed


def speed_row(each: Match, runs: Runs, failed: dict[str, str]) -> list[str]:
    """Returns the cells of a method: medians, their ratios, the verdict, and memory; empty if a side failed."""
    measured = [[] if c.name in failed else runs[c.name] for c in each.contestants]
    medians = [statistics.median(seconds_of(one)) if one else None for one in measured]
    tp1, tp2, theirs = medians
    ratios = [ours / theirs if ours is not None and theirs is not None else None for ours in (tp1, tp2)]
    known = [ratio for ratio in ratios if ratio is not None]
    alone = runs[each.copying.name] if each.copying is not None and each.copying.name not in failed else []
    copying = statistics.median(seconds_of(alone)) if alone else None
    return [
        each.name,
        *("failed" if median is None else f"{median:.3f}" for median in medians),
        *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        verdict(max(known) <= 1) if len(known) == len(ratios) else "",
        "" if copying is None else f"{copying:.3f}",
        "" if copying is None or theirs is None else f"{copying / theirs:.2f}",
        *(gigabytes(one, "memory") if one else "" for one in measured),
        each.how,
    ]


def speed_page(
    path: str, command: str, matches: list[Match], runs: Runs, failed: dict[str, str], load: float, count: int
) -> str:
    """Formats the page: the measurement, a line for each method, the spread, and methods without figures."""
    heads = ["method", "distquant tp=1, median s", "tp=2, median s", "upstream, median s"]
    heads += ["tp=1 / upstream", "tp=2 / upstream", "bar: not slower than upstream"]
    heads += ["copying alone, median s", "copying / upstream"]
    heads += ["peak memory GB tp=1", "tp=2", "upstream", "upstream is"]
    cores = os.cpu_count() or 1
    parts = [
        f"# Loading {Path(path).name} by method, {today()}",
        about(path, load),
        f"Command: `{command}`; {count} of each, in turns.\n"
        "A ratio below 1: distquant took less time than upstream, the method's own library.",
        table(heads, [speed_row(each, runs, failed) for each in matches]),
        ranges(matches, runs),
    ]
    if failed:
        parts.append("Failed:\n\n" + "\n".join(f"- {shortened(reason)}" for reason in failed.values()))
    parts += [
        "No row:\n\n" + "\n".join(f"- {method}: {why}." for method, why in WITHOUT.items()),
        "Seconds are medians of those of the slowest rank, from the call of the load to the assembled model;\n"
        "processes started, imports done, the small example model loaded, files in the page cache. tp=1 and upstream:\n"
        f"one process with {cores} threads; tp=2: two with {max(1, cores // 2)}. The bar is met where neither\n"
        "distquant tp=1 nor tp=2 took longer. `stored:` is a checkpoint that upstream quantized and saved;\n"
        "every byte of what is loaded from it is read once within the time, because upstream maps files.\n"
        "Copying alone: all bytes of the files read from the page cache into new memory (huge pages), by a thread for\n"
        "each core, and touched. No loader is faster whose weights are in memory of its own, as distquant's are.\n"
        "Peak memory: resident memory over that before the load, summed over the processes\n"
        "(pages of mapped files count). Upstream loads in bfloat16 and quantizes the same linears.",
    ]
    return "\n\n".join(parts) + "\n"


def shortened(reason: str) -> str:
    """Shortens an error to a line."""
    return textwrap.shorten(reason, 300, placeholder=" ...")


def ranges(matches: list[Match], runs: Runs) -> str:
    rows = []
    for each in matches:
        cells = [seconds_of(runs[contestant.name]) for contestant in each.all]
        cells += [[]] if each.copying is None else []
        rows.append([each.name, *(f"{min(one):.3f} - {max(one):.3f}" if one else "" for one in cells)])
    return table(["range of seconds", "distquant tp=1", "tp=2", "upstream", "copying alone"], rows)


def speed(arguments: argparse.Namespace) -> int:
    path = os.path.abspath(arguments.checkpoint)
    refuse_unknown(arguments.only, NAMES)
    os.makedirs(arguments.work, exist_ok=True)
    load = os.getloadavg()[0]
    matches, not_made = [], {}
    for name in [name for name in NAMES if not arguments.only or name in arguments.only]:
        try:
            matches.append(match(name, path, arguments.work))
        except SystemExit as error:  # the library cannot make the checkpoint
            not_made[name] = f"{name}: {error}"
    runs, failed = alternate(matches, arguments.runs)
    failed |= not_made
    only = f" --only {shlex.join(arguments.only)}" if arguments.only else ""
    command = f"python benchmarks/methods.py speed {Path(path).name} --runs {arguments.runs}{only}"
    page = speed_page(path, command, matches, runs, failed, load, arguments.runs)
    write(page, f"methods-{slug(Path(path).name)}", arguments.out)
    names = [[contestant.name in failed for contestant in each.contestants] for each in matches]
    return 1 if any((tp1 or tp2) and not theirs for tp1, tp2, theirs in names) else 0


# -- both --------------------------------------------------------------------------------------------------------------


def refuse_unknown(only: list[str] | None, names: list[str] | tuple[str, ...]) -> None:
    unknown = [name for name in only or () if name not in names]
    if unknown:
        sys.exit(f"--only: {', '.join(unknown)} not among {', '.join(names)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="{quality,speed}")
    one = commands.add_parser(
        "quality",
        help="perplexity, fingerprint, bits, seconds and memory of every method, of distquant alone",
        description="What quantizing with every method costs, at tp=1 and tp=2.",
        usage="%(prog)s MODEL --text FILE [--only NAME ...] [--out FILE]",
    )
    one.add_argument("model", metavar="MODEL", help="folder of a bf16 model with its tokenizer")
    one.add_argument("--text", required=True, metavar="FILE", help="text that perplexity is measured on")
    one.add_argument("--only", nargs="+", metavar="NAME", help="only these of distquant's short names: nf4 int8 ...")
    one.add_argument("--out", metavar="FILE", help="page to write; default: the table in docs/quality.md is replaced")
    one.set_defaults(run=quality)
    two = commands.add_parser(
        "speed",
        help="seconds of distquant, of each method's own library, and their ratio",
        description="How long loading with every method takes, beside the library that the method comes from.",
        usage="%(prog)s CHECKPOINT [--runs N] [--only NAME ...] [--work FOLDER] [--out FILE]",
    )
    two.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a bf16 model")
    two.add_argument("--runs", type=int, default=5, metavar="N", help="loads of each, of which the median counts")
    two.add_argument("--only", nargs="+", metavar="NAME", help=f"only these: {' '.join(NAMES)}")
    two.add_argument("--out", metavar="FILE", help="page to write; default: benchmarks/results/WHAT_HARDWARE_DATE.md")
    two.add_argument(
        "--work",
        metavar="FOLDER",
        default=os.path.join(tempfile.gettempdir(), "distquant-methods"),
        help="where quantized checkpoints are made once, and kept by the checkpoint's name; default: %(default)s",
    )
    two.set_defaults(run=speed)
    arguments = parser.parse_args()
    path = os.path.abspath(getattr(arguments, "model", None) or arguments.checkpoint)
    if not shards(path) or not os.path.isfile(os.path.join(path, "config.json")):
        parser.error(f"{path} holds no config.json with safetensors files")
    if getattr(arguments, "runs", 1) < 1:
        parser.error("--runs must be 1 or more")
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    sys.exit(arguments.run(arguments))


if __name__ == "__main__":
    main()
