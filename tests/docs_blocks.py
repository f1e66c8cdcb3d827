"""The fenced blocks of the pages, and what is run of them.

The rule that pages are written by, so that every block can be run as it stands:

- Each block names its language. `python` and `bash` are run, all others only shown.
- `PLACEHOLDERS` are replaced. Everything else is run literally, in an empty folder that has links to the repository's
  `examples`, `launchers`, `benchmarks` and `docs`.
- The Python blocks of a page run in order in one namespace, as someone pastes them one after the other. All pages share
  one process, because importing torch and transformers takes longer than most blocks.
- A Python block that begins with `# NAME.py` is a file instead: a shell block of the page runs it.
- A comment right before the block says otherwise. `<!-- run: 2 ranks -->`: Python under torchrun; those of a page share
  a namespace of their own. `<!-- run: wide -->`: a shell block that is slow, run with the wide tests.
  `<!-- run: no, REASON -->`: not run.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

LEFT_OUT = ("docs/benchmarks.md",)
"""A script makes it from dated results: its commands are records of what was measured, on other machines."""

PLACEHOLDERS = {
    "MODEL": "the trained example in the repository",
    "CHAT_MODEL": "the same with a chat template",
    "MIXTRAL": "a small Mixtral with random weights",
    "TEXT": "a text file",
}
"""Words of a block that stand for a path -> the thing at that path."""

RUN = ("python", "bash")
SHOWN = ("text", "toml", "json", "yaml")

FENCE = re.compile(r"^(?P<fence>```+|~~~+)(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=fence)[^\S\n]*$", re.M | re.S)
COMMENT = re.compile(r"<!-- *run: *([^>]*?) *-->\s*\Z")
MARK = re.compile(r"no, (?P<reason>\S+ \S+ .+)|(?P<ranks>[2-9]) ranks|(?P<wide>wide)|", re.S)
INDENTED = re.compile(r"(?<=\n\n) {4,}\S.*")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: path below the repository.
        line: number of its first line of code.
        language: word behind the fence.
        text: the code.
        mark: text of the comment before it that begins with `run:`; "" = there is none.
    """

    page: str
    line: int
    language: str
    text: str
    mark: str = ""

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def reason(self) -> str:
        """The reason why it is not run; "" if it is."""
        return self._marked("reason")

    @property
    def ranks(self) -> int:
        return int(self._marked("ranks") or 1)

    @property
    def wide(self) -> bool:
        return bool(self._marked("wide"))

    @property
    def file(self) -> str:
        """The name of the file that a Python block is; "" if it is none."""
        match = re.match(r"# (\w+\.py)$", self.text, re.M) if self.language == "python" else None
        return match[1] if match else ""

    @property
    def fault(self) -> str:
        """What is wrong with its language or mark; "" = nothing."""
        if self.language not in (*RUN, *SHOWN):
            return f"language {self.language!r}, not one of {', '.join((*RUN, *SHOWN))}"
        if not MARK.fullmatch(self.mark):
            return f"unknown mark {self.mark!r}"
        language = "python" if self.ranks > 1 else "bash" if self.wide else self.language
        if self.mark and (self.language not in RUN or self.language != language):
            return f"mark {self.mark!r} on a block of {self.language}"
        return ""

    def filled(self, values: Mapping[str, str]) -> str:
        """Returns the code with the placeholders replaced."""
        return re.sub(r"\b(" + "|".join(values) + r")\b", lambda match: values[match[1]], self.text)

    def _marked(self, name: str) -> str:
        match = MARK.fullmatch(self.mark)
        return (match[name] if match else "") or ""


def blocks_of(text: str, page: str) -> Iterator[Block]:
    """Yields the fenced blocks of a page."""
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        mark = COMMENT.search(before)
        line = before.count("\n") + 2
        yield Block(page, line, match["language"].strip(), match["text"], mark[1] if mark else "")


def indented(text: str) -> list[str]:
    """Returns the first lines of code that is only indented: it has no language, so nobody could run it."""
    return [line.strip() for line in INDENTED.findall(FENCE.sub("", text))]


def pages() -> list[str]:
    found = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    names = [path.relative_to(ROOT).as_posix() for path in found]
    return [name for name in names if name not in LEFT_OUT]


def every_block() -> list[Block]:
    return [block for page in pages() for block in blocks_of((ROOT / page).read_text(encoding="utf-8"), page)]


def run_python(folders: Mapping[str, str], values: Mapping[str, str]) -> dict[str, str]:
    """Runs the Python blocks of each page in its folder; returns what went wrong, by page."""
    faults = {}
    for page, folder in folders.items():
        os.chdir(folder)
        namespace: dict[str, object] = {"__name__": "__main__"}
        for block in blocks_of((ROOT / page).read_text(encoding="utf-8"), page):
            if block.language != "python" or block.reason or block.file or block.ranks > 1:
                continue
            code = "\n" * (block.line - 1) + block.filled(values)  # an error has the line of the page
            try:
                exec(compile(code, page, "exec"), namespace)
            except BaseException:
                faults[page] = traceback.format_exc()
                break
    return faults


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(run_python(**json.loads(Path(sys.argv[1]).read_text()))))
