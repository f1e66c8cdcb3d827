"""Measures the quality of every method, and the speed of its loads beside the library that it comes from.

    python benchmarks/methods.py quality MODEL --text FILE [--only nf4 hqq ...] [--out FILE]
    python benchmarks/methods.py speed CHECKPOINT [--runs 5] [--only nf4 stored:nf4 ...] [--io buffered] [--work FOLDER]
                                     [--out FILE]

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
import os
import shlex
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from checkpoints import shards
from common import ROOT, table, write
from method_pages import about, check_known, today
from method_ranks import LOADS, Quality, Ranks
from method_speed import NAMES, speed

BEGIN, END = "<!-- quality: begin -->", "<!-- quality: end -->"
"""The lines of docs/quality.md between which the table is written."""
DOCUMENT = ROOT / "docs" / "quality.md"


def plannable(path: str, only: list[str] | None) -> tuple[list[str], dict[str, str]]:
    """Returns short names of the methods that can run here, and of the others with the reason why not."""
    import distquant as dq
    from distquant.errors import InputError
    from distquant.quantization.registry import config_classes

    names = [name for kind in config_classes() for name in kind.short_names]
    check_known(only, names)
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
        usage="%(prog)s CHECKPOINT [--runs N] [--only NAME ...] [--io WAY] [--work FOLDER] [--out FILE]",
    )
    two.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a bf16 model")
    two.add_argument("--runs", type=int, default=5, metavar="N", help="loads of each, of which the median counts")
    two.add_argument("--only", nargs="+", metavar="NAME", help=f"only these: {' '.join(NAMES)}")
    two.add_argument(
        "--io",
        default="auto",
        choices=("auto", "buffered", "direct", "mapped"),
        help="distquant's way to read files; default: auto",
    )
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
