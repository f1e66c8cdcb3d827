"""Random changes of bytes, text and JSON, from one seed: each changes one thing or a few, and keeps the rest."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

INTEGERS = (
    0,
    1,
    -1,
    2,
    7,
    8,
    127,
    128,
    255,
    256,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
"""Integers at which programs err."""

TEXTS = (
    "",
    " ",
    "\0",
    "\x1b[2J",
    "\ud800",
    "..",
    "/",
    "a" * 300,
    "null",
    "NaN",
    "-1",
    "é",
    "\u202e",
    "%s",
    "{}",
    "0",
    "bfloat16",
    "nf4",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    1.5,
    float("nan"),
    float("inf"),
    -0.0,
    1e308,
    [],
    {},
    [[]],
    [None],
    {"": None},
    *INTEGERS,
    *TEXTS,
)


class Mutator:
    """Changes inputs; equal seeds make equal changes."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def json_text(self, document: Any) -> str:
        """Returns JSON with a few values replaced, deleted, repeated, moved or nested; at times a key stands twice."""
        document = json.loads(json.dumps(document))
        for _ in range(self.random.choice((1, 1, 1, 2, 3))):
            document = self._changed(document)
        text = json.dumps(document)
        if self.random.random() < 0.05 and text.startswith('{"'):
            text = text[:-1] + ", " + text[1:]
        return self.bytes(text.encode()).decode(errors="surrogateescape") if self.random.random() < 0.1 else text

    def _changed(self, document: Any) -> Any:
        places = [((), document), *_places(document)]
        path, value = self.random.choice(places)
        if not path:
            return self.random.choice(VALUES) if self.random.random() < 0.2 else document
        owner = document
        for part in path[:-1]:
            owner = owner[part]
        key, how = path[-1], self.random.randrange(8)
        if how == 0:
            del owner[key]
        elif how == 1 and isinstance(owner, dict):
            owner[self.random.choice(TEXTS)] = value
        elif how == 2:
            owner[key] = {key if isinstance(key, str) else "a": value}
        elif how == 3:
            owner[key] = [value] * self.random.choice((1, 2, 1000))
        elif how == 4:
            owner[key] = json.loads(json.dumps(self.random.choice(places)[1]))  # a copy: it may hold this place
        elif how == 5 and isinstance(value, (int, float)):
            owner[key] = self.random.choice(
                (value + 1, value - 1, value * 2, -value, value // 2 if value == value else 0, str(value))
            )
        else:
            owner[key] = self.random.choice(VALUES)
        return json.loads(json.dumps(document))  # no part stands in two places

    def bytes(self, content: bytes, end: int | None = None) -> bytes:
        """Returns bytes with some of the first `end` flipped, removed, repeated, or replaced by an integer."""
        made = bytearray(content)
        for _ in range(self.random.choice((1, 1, 2, 4))):
            size = min(len(made), len(made) if end is None else end)
            if not size:
                break
            place, how = self.random.randrange(size), self.random.randrange(6)
            if how == 0:
                made[place] ^= 1 << self.random.randrange(8)
            elif how == 1:
                made[place] = self.random.choice((0, 1, 0x7F, 0x80, 0xFF, 0x1B, 0x22, 0x5C, 0x7B))
            elif how == 2:
                del made[place : place + self.random.choice((1, 2, 8, 100))]
            elif how == 3:
                made[place:place] = made[place : place + self.random.choice((1, 4, 8, 64))]
            elif how == 4:
                made[place : place + 8] = struct.pack("<Q", self.random.choice(INTEGERS) % 2**64)
            else:
                made[place : place + 4] = struct.pack("<I", self.random.choice(INTEGERS) % 2**32)
        return bytes(made)

    def text(self) -> str:
        """Returns a hostile text."""
        return "".join(
            self.random.choice((*TEXTS, "=", ",", "tp", "8", "GiB", "-"))
            for _ in range(self.random.choice((1, 1, 2, 3)))
        )


def _places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    """Returns the path of each value inside of a document, and the value."""
    found = []
    keys = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in keys:
        found += [((*path, key), document[key]), *_places(document[key], (*path, key))]
    return found
