"""Inputs that once failed, in `corpus/`: the files that were changed, and `case.json` with the rest."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from spoiled import REPOSITORY, Input, copied, write, write_json

CORPUS = Path(__file__).with_name("corpus")


def keep_input(given: Input, folder: Path) -> None:
    """Writes what an input changes in its checkpoint into a folder: the files, and `case.json`."""
    with tempfile.TemporaryDirectory() as root:
        copy = Path(root) / "copy"
        copied(given.base, copy)
        if given.spoil is not None:
            given.spoil(copy)
        folder.mkdir(parents=True)
        for file in copy.iterdir():
            if not file.is_symlink():
                write(folder / file.name, file.read_bytes())
    inside = given.base.is_relative_to(REPOSITORY)
    base = given.base.relative_to(REPOSITORY).as_posix() if inside else given.base.name
    case = {"kind": given.kind, "name": given.name, "base": base, "commands": given.commands}
    write_json(folder / "case.json", case)


def kept() -> Iterator[Input]:
    """Yields the inputs of the corpus."""
    for file in sorted(CORPUS.glob("*/case.json")):
        case = json.loads(file.read_text())
        commands = tuple(tuple(words) for words in case["commands"])
        yield Input(case["kind"], file.parent.name, REPOSITORY / case["base"], partial(_take, file.parent), commands)


def _take(source: Path, folder: Path) -> None:
    """Puts the kept files of a case into a copy of its checkpoint."""
    for file in source.iterdir():
        if file.name != "case.json":
            write(folder / file.name, file.read_bytes())
