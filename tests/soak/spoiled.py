"""Inputs that are wrong in one thing: a checkpoint of links to a good one's files, in which some are written anew."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trials

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY / "tests" / "data"
KJV = REPOSITORY / "examples" / "models" / "kjv-tiny"
PROMPT = ("--prompt", "In the", "--max-new-tokens", "2")

Spoil = Callable[[Path], None]


@dataclass(frozen=True)
class Input:
    """One hostile input.

    Attributes:
        kind: the row of the table.
        name: tells it from the others of its kind.
        base: checkpoint (a folder or one file) that it is made of.
        spoil: changes a copy of it: gets the folder.
        commands: command lines, of which `MODEL` stands for the copy; the next is run if the one before was done.
    """

    kind: str
    name: str
    base: Path = KJV
    spoil: Spoil | None = None
    commands: tuple[tuple[str, ...], ...] = (("plan", "MODEL"), ("load", "MODEL"))


def ready() -> None:
    """Imports what commands need, as quietly as the command line does."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    trials.warm(KJV)


def copied(base: Path, folder: Path) -> Path:
    """Returns a checkpoint in `folder` of links to another one's files."""
    folder.mkdir(parents=True)
    for file in sorted(base.iterdir()) if base.is_dir() else [base]:
        (folder / file.name).symlink_to(file.resolve())
    return folder if base.is_dir() else folder / base.name


def write(path: Path, content: bytes | str) -> None:
    """Writes a file in place of a link; a text may have lone surrogates, which become the bytes they stand for."""
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, NaN included; anything outside ASCII is escaped."""
    write(path, json.dumps(value))


def tried(inputs: Iterable[Input], folder: Path, progress: bool = False) -> Iterator[trials.Trial]:
    """Tries inputs one after the other.

    Args:
        inputs: hostile inputs.
        folder: gets a copy of each, which is removed again.
        progress: True to count them on standard error.
    """
    for number, given in enumerate(inputs):
        copy = folder / str(number)
        model = copied(given.base, copy)
        if given.spoil is not None:
            given.spoil(copy)
        read = trials.bytes_of(copy)
        for argv in given.commands:
            words = [str(model) if word == "MODEL" else word.replace("COPY", str(copy)) for word in argv]
            ended = trials.attempt(trials.command(*words), read)
            if ended.outcome is not trials.Outcome.DONE:
                break
        yield trials.Trial(given.kind, f"{given.name} [{argv[0]}]", ended)
        remove(copy)
        if progress and number % 50 == 0:
            print(f"{number} tried", file=sys.stderr)


def remove(folder: Path) -> None:
    """Removes a copy, whatever a trial has put there."""
    for path, folders, files in os.walk(folder, topdown=False):
        for name in files + folders:
            place = os.path.join(path, name)
            os.rmdir(place) if os.path.isdir(place) and not os.path.islink(place) else os.unlink(place)
    os.rmdir(folder)
