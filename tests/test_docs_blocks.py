"""Every code block of README and docs runs as it stands; `docs_blocks` has the rule that pages are written by.

To see the blocks that are not run, with their reasons: `python tests/test_docs_blocks.py`.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from docs_blocks import LEFT_OUT, PLACEHOLDERS, ROOT, Block, blocks_of, every_block, indented, pages

BLOCKS = every_block()
PYTHON = [block for block in BLOCKS if block.language == "python" and not block.reason]
SHELL = [block for block in BLOCKS if block.language == "bash" and not block.reason]
NOT_RUN = [block for block in BLOCKS if block.reason]

MOST_NOT_RUN = 7
"""Blocks that may be left out, each with a reason on its page. Think of a way to run a new one before raising this."""

PYTHON_PAGES = list(dict.fromkeys(block.page for block in PYTHON if block.ranks == 1 and not block.file))

LINKED = ("examples", "launchers", "benchmarks", "docs")
PROGRAMS = {
    "python": "",
    "distquant": "-m distquant",
    "torchrun": "-m torch.distributed.run",
    "accelerate": "-m accelerate.commands.accelerate_cli",
}
"""Commands of a shell block -> how this Python runs them."""


def listed(blocks: list[Block]) -> str:
    return "\n".join(f"{block.where}: {block.reason}" for block in blocks)


# -- what pages may hold -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages())
def test_every_block_has_a_language_and_a_known_mark(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [f"{block.where}: {block.fault}" for block in blocks_of(text, page) if block.fault] == []
    assert indented(text) == [], "indented code has no language; fence it"
    assert text.count("<!-- run:") == sum(bool(block.mark) for block in blocks_of(text, page)), "a mark without block"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_blocks_that_are_not_run_are_few_and_say_why() -> None:
    assert len(NOT_RUN) <= MOST_NOT_RUN, "\n" + listed(NOT_RUN)
    assert all((ROOT / page).is_file() for page in LEFT_OUT)


def test_every_file_of_a_page_is_run_by_its_shell_blocks() -> None:
    files = [block for block in BLOCKS if block.file]
    commands = {block.page: "" for block in files}
    for block in SHELL:
        commands[block.page] = commands.get(block.page, "") + block.text
    assert [block.where for block in files if block.file not in commands[block.page].split()] == []


@pytest.mark.parametrize(
    ("page", "fault"),
    [
        ("```\nls\n```\n", "language ''"),
        ("```sh\nls\n```\n", "language 'sh'"),
        ("<!-- run: no -->\n```bash\nls\n```\n", "unknown mark 'no'"),
        ("<!-- run: later -->\n\n```bash\nls\n```\n", "unknown mark 'later'"),
        ("<!-- run: no, it is old -->\n```text\nls\n```\n", "on a block of text"),
        ("<!-- run: wide -->\n```python\nx = 1\n```\n", "on a block of python"),
    ],
)
def test_a_planted_fault_is_found(page: str, fault: str) -> None:
    (block,) = blocks_of(page, "planted.md")
    assert fault in block.fault


def test_marks_files_and_placeholders_are_read() -> None:
    text = "<!-- run: 2 ranks -->\n```python\n# load.py\nload('MODEL', MODELS)\n```\n\n"
    text += "<!-- run: no, needs two GPUs -->\n\n~~~bash\nls\n~~~\n"
    code, shell = blocks_of(text, "planted.md")
    assert (code.ranks, code.file, code.line, code.fault) == (2, "load.py", 3, "")
    assert code.filled({"MODEL": "/m"}) == "# load.py\nload('/m', MODELS)\n"
    assert (shell.reason, shell.line, shell.fault) == ("needs two GPUs", 10, "")
    assert indented("Text.\n\n    make demo\n") == ["make demo"]


# -- the blocks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def values(kjv_tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the placeholders stand for."""
    from moe_models import make_model

    mixtral = tmp_path_factory.mktemp("models") / "mixtral"
    make_model("mixtral", vocab_size=2048).save_pretrained(mixtral)
    for file in Path(kjv_tiny).glob("tokenizer*"):
        shutil.copy(file, mixtral)
    chat = shutil.copytree(kjv_tiny, mixtral.with_name("chat"))
    settings = json.loads((chat / "tokenizer_config.json").read_text())
    template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    (chat / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    found = {"MODEL": kjv_tiny, "CHAT_MODEL": str(chat), "MIXTRAL": str(mixtral), "TEXT": f"{kjv_tiny}/validation.txt"}
    assert found.keys() == PLACEHOLDERS.keys()
    return found


def linked(folder: Path) -> Path:
    """Makes the folder that a page's blocks run in."""
    folder.mkdir()
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory of shell blocks, with the commands of an installed distquant on the path."""
    folder, programs = linked(tmp_path / "page"), tmp_path / "bin"
    programs.mkdir()
    for name, module in PROGRAMS.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module} "$@"\n')
        (programs / name).chmod(0o755)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("TRANSFORMERS_VERBOSITY", "TOKENIZERS_PARALLELISM"):  # the command line sets them in its process
        monkeypatch.setenv(name, os.environ.get(name, "error"))
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are small, and the command line would leave its own number behind."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bash(script: str) -> None:
    """Runs a script that must succeed, command by command."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        capture_output=True,
        text=True,
        timeout=900,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"


@pytest.fixture(scope="module")
def faults(values: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong in the Python blocks, by page."""
    root = tmp_path_factory.mktemp("pages")
    folders = {page: str(linked(root / page.replace("/", "-"))) for page in PYTHON_PAGES}
    (root / "in.json").write_text(json.dumps({"folders": folders, "values": values}))
    command = [sys.executable, ROOT / "tests" / "docs_blocks.py", root / "in.json", root / "out.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((root / "out.json").read_text())


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python(page: str, faults: dict[str, str]) -> None:
    assert page not in faults, faults[page]


@pytest.mark.parametrize("page", dict.fromkeys(b.page for b in PYTHON if b.ranks > 1))
def test_python_of_a_page_for_several_ranks(page: str, workdir: Path, values: dict[str, str]) -> None:
    blocks = [block for block in PYTHON if block.page == page and block.ranks > 1]
    (ranks,) = {block.ranks for block in blocks}
    code = "\n".join(block.filled(values) for block in blocks)
    (workdir / "blocks.py").write_text(f"{code}\nimport torch\ntorch.distributed.destroy_process_group()\n")
    bash(f"torchrun --standalone --nproc-per-node {ranks} blocks.py")


def commands_of(script: str) -> list[list[str]] | None:
    """Returns the arguments of each command, if all are plain calls of `distquant`: they can share this process."""
    lines = [shlex.split(line, comments=True) for line in script.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if line]
    words = [word for line in lines for word in line]
    plain = all(line[0] == "distquant" for line in lines) and not {"|", "<", ">", "&&", "&"} & {*words}
    return [line[1:] for line in lines] if plain else None


@pytest.mark.parametrize(
    "block", [pytest.param(b, id=b.where, marks=[pytest.mark.wide] if b.wide else []) for b in SHELL]
)
def test_shell(block: Block, workdir: Path, values: dict[str, str]) -> None:
    from distquant.cli.main import main

    for file in PYTHON:
        if file.page == block.page and file.file:
            (workdir / file.file).write_text(file.filled(values))
    script = block.filled(values)
    commands = commands_of(script)
    if commands is None:
        bash(script)
        return
    for arguments in commands:
        assert main(arguments) == 0, arguments


if __name__ == "__main__":
    print(listed(NOT_RUN))
    print(f"{len(NOT_RUN)} of {len(NOT_RUN) + len(PYTHON) + len(SHELL)} blocks are not run; pages left out: {LEFT_OUT}")
