"""Tables and errors: plain where nobody looks, structured on a terminal, never taken for markup or control codes."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from distquant.cli import terminal
from distquant.cli.render import report_parts
from distquant.tables import table

EVIL = "\x1b[31mred\x1b]0;title\x07[bold]not bold[/bold]:smile:\r"

ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def on_terminal(code: str, columns: int = 80, **environment: str) -> str:
    """What a script writes to a real terminal of so many columns."""
    master, slave = pty.openpty()
    variables = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), **environment}
    variables.pop("NO_COLOR", None) if "NO_COLOR" not in environment else None
    process = subprocess.Popen([sys.executable, "-c", code], stdout=slave, stderr=slave, env=variables)
    os.close(slave)
    found = b""
    while True:
        try:
            found += os.read(master, 4096)
        except OSError:
            break
    os.close(master)
    assert process.wait(60) == 0, found
    return found.decode().replace("\r\n", "\n")


ERRORS = f"""
from distquant.cli.terminal import show_error
from distquant.errors import InputError, Problem
first = Problem("mesh", "unknown axis 'pt' in [bold]pt=2[/bold]", "Use dp, ep or tp")
two = InputError([first, Problem({EVIL!r}, "x", "y")])
show_error(two)
show_error(InputError.one("--prompt", "has 0 tokens, 1 are needed " * 4, "Give a longer text"))
show_error("the fingerprints differ", "rank 1: ")
"""


@pytest.mark.parametrize("columns", [40, 80])
def test_errors_on_a_terminal_are_lists(columns: int) -> None:
    text = ANSI.sub("", on_terminal(ERRORS, columns))
    lines = [line.rstrip() for line in text.split("\n")]
    assert all(len(line) <= columns for line in lines)
    assert lines[:3] == ["distquant: 2 problems", "  1. mesh", "     problem  unknown axis 'pt' in"] or columns == 80
    assert "     problem  unknown axis 'pt' in [bold]pt=2[/bold]" in lines or columns == 40
    assert "     fix      Use dp, ep or tp" in lines
    assert "distquant: --prompt" in lines
    assert "  fix      Give a longer text" in lines
    assert " ".join(lines).rstrip().endswith("distquant: rank 1: the fingerprints differ")
    assert "\x1b" not in text and "\x07" not in text
    assert "\\x1b[31mred" in text.replace("\n", "").replace("     ", "")


def test_colours_go_off() -> None:
    colour = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
    assert colour.search(on_terminal(ERRORS))
    assert not colour.search(on_terminal(ERRORS, NO_COLOR="1"))
    plain = on_terminal(ERRORS, TERM="dumb")
    assert "\x1b[" not in plain.replace(EVIL, "")
    assert "distquant: 2 problems:\n  1. mesh: unknown axis" in plain


def test_errors_elsewhere_are_as_they_are() -> None:
    done = subprocess.run([sys.executable, "-c", ERRORS], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == ""
    assert done.stderr.startswith("distquant: 2 problems:\n  1. mesh: unknown axis 'pt' in [bold]pt=2[/bold]. Use dp,")


TABLES = f"""
from distquant.cli.terminal import show
from distquant.tables import table
show("a [red]line[/red]", table(("file", "bytes"), [({EVIL!r}, "12 B"), ("model.safetensors", "1,234 B")]), "", "end")
"""


@pytest.mark.parametrize("columns", [30, 80])
def test_tables_on_a_terminal(columns: int) -> None:
    text = ANSI.sub("", on_terminal(TABLES, columns))
    lines = text.split("\n")
    assert all(len(line) <= columns for line in lines)
    assert lines[0] == "a [red]line[/red]"
    assert "─" in text and "\x1b" not in text and "\x07" not in text and "\r" not in text
    joined = "".join(line[: columns - 9].strip() if columns == 30 else line for line in lines).replace(" ", "")
    assert "[bold]notbold[/bold]:smile:\\r" in joined
    assert lines[-2] == "end"


def test_tables_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show("first", table(("name", "n"), [("a\x1b[0m", "1"), ("b", "12")]))
    assert capsys.readouterr().out == "first\nname       n\n--------  --\na\\x1b[0m   1\nb         12\n"


# -- the report of a load ----------------------------------------------------------------------------------------------


@pytest.fixture
def report() -> Callable[[int], dict]:
    def make(ranks: int) -> dict:
        from distquant.loading.report import RankReport

        rows = [
            RankReport(
                rank=r, seconds=4.0 + (r == 11) / 2, bytes_read=1 << 30, quantized_bytes=1 << 28,
                unquantized_bytes=1 << 20, staging_bytes=1 << 26, kernel="cpu: AVX2",
                limit="place" if r == 11 else "read",
            )
            for r in range(ranks)
        ]  # fmt: skip
        import dataclasses

        return {
            "fingerprint": "0" * 32, "plan_digest": "", "runtime": "ray", "mesh": f"tp={ranks}", "world_size": ranks,
            "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "seconds": max(r.seconds for r in rows), "checkpoint_bytes": 0,
            "model_bytes": ranks * ((1 << 28) + (1 << 20)), "ranks": [dataclasses.asdict(r) for r in rows],
        }  # fmt: skip

    return make


def test_a_load_is_told_in_three_lines(report: Callable[[int], dict]) -> None:
    assert report_parts(report(2), "models/some") == [
        "loaded models/some as nf4: 514.00 MiB of weights, 512.00 MiB of it quantized; "
        "at most 257.00 MiB on each of 2 ranks (ray, mesh tp=2)",
        "took 4.00 s; read 2.00 GiB, 512.00 MiB/s; limited by reading",
        f"fingerprint {'0' * 32}",
    ]


def test_a_load_on_many_ranks_names_the_last(report: Callable[[int], dict]) -> None:
    assert len(report_parts(report(64))) == 3
    assert report_parts(report(64))[1].endswith("; limited by filling; rank 11 was last")


def test_all_of_a_load(report: Callable[[int], dict]) -> None:
    parts = report_parts(report(64), verbose=True)
    figures, stages = (part for part in parts if isinstance(part, terminal.Table))
    assert "load buffer" in figures.header
    assert stages.header == ("rank", "reading", "copying", "quantizing", "exchanging", "filling")
    assert [row[0] for row in figures.rows] == [*map(str, range(8)), "11", *map(str, range(56, 64))]
    assert "kernels cpu: AVX2" in parts
    assert len(parts) > 6 and parts[-1].startswith("fingerprint ")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True,
          "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}, "nf4-dq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}, "int8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 48}, "gptq"),
        ({"quant_method": "none"}, "stored"),
        ({"quant_method": "unheard-of"}, "unheard-of"),
    ],
)  # fmt: skip
def test_a_quantization_has_a_short_name(report: Callable[[int], dict], config: dict, name: str) -> None:
    assert report_parts({**report(1), "quantization_config": config})[0].startswith(f"loaded the model as {name}: ")
