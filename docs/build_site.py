"""Builds the documentation site: `python docs/build_site.py` writes `build/site`, without a network.

GitHub shows README.md, docs/*.md and benchmarks/results/*.md in their folders, so their links are relative to that. The
site keeps the same tree: pages are copied to `build/docs` under their own paths, and with them whatever they link to.
Pictures are copied as they are; a source file or a folder becomes a page that shows it. So one link works in both.

A link to a file that is not there fails here, one to a page or a heading that is not there in zensical's strict mode.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
STAGE, SITE = BUILD / "docs", BUILD / "site"

START = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md", "benchmarks/results/*.md", "docs/assets/*")
AS_IT_IS = {".svg", ".png", ".jpg", ".gif", ".js", ".css"}
LANGUAGES = {".py": "python", ".sh": "bash", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml", ".json": "json"}

UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n\n"

CODE = r"^(?P<fence>`{3,}|~{3,}).*?^(?P=fence)[^\S\n]*$|(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)"
LINK = re.compile(CODE + r"|(?<=\]\()(?P<target>[^)\s]+)(?=\))", re.M | re.S)
"""Finds the target of an inline link. Code is matched first, so that nothing in it is taken for a link."""

ITEM = re.compile(r"(?P<indent> *)(?:[-*+]|\d+\.) ")

REMOTE = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=["']?(?:https?:)?//[^>]*>""")
"""Matches tags for which a browser fetches something from elsewhere. `rel=canonical` and its like are never fetched."""
NOT_FETCHED = re.compile(r"""\brel=["']?(?:canonical|alternate|next|prev|edit)\b""")
MERMAID = re.compile(r"^(?:```|~~~)\s*mermaid", re.M)
"""A diagram that is drawn by a library from the network."""

CONFIG = ROOT / "docs" / "mkdocs.yml"
NAV = re.compile(r"^ +- [^:]+: (\S+\.md)$", re.M)


class Stage:
    """The tree that the site is built from. `problems` lists links that lead nowhere."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._waiting = [path for pattern in START for path in sorted(ROOT.glob(pattern))]
        self._done: set[Path] = set()

    def fill(self) -> None:
        """Copies all pages and what they link to, and what that links to."""
        while self._waiting:
            source = self._waiting.pop()
            if source not in self._done:
                self._done.add(source)
                self._stage(source)

    def check_navigation(self) -> None:
        """Compares the navigation with the pages in docs/: zensical skips what one of them lacks."""
        listed = NAV.findall(CONFIG.read_text(encoding="utf-8"))
        pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
        self.problems += [f"docs/mkdocs.yml: {page} does not exist" for page in listed if not (ROOT / page).exists()]
        self.problems += [f"docs/mkdocs.yml: nav has no {page}" for page in sorted(pages - set(listed))]

    def _stage(self, source: Path) -> None:
        inside = source.relative_to(ROOT)
        if source.is_dir():
            write(STAGE / inside / "index.md", folder_page(source))
        elif source.suffix in AS_IT_IS:
            (STAGE / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, STAGE / inside)
        elif source.suffix == ".md":
            text = source.read_text(encoding="utf-8")
            if MERMAID.search(text):
                self.problems.append(f"{inside}: a mermaid diagram needs the network; draw it as an SVG file")
            linked = LINK.sub(lambda match: self._target(source, text, match), text)
            write(STAGE / inside, markdown_lists(linked))
        else:
            write(STAGE / f"{inside}.md", source_page(source))

    def _target(self, page: Path, text: str, match: re.Match[str]) -> str:
        """The link's target in the site; all else that matched stays as it is."""
        target = match.group("target")
        if target is None or target.startswith("#") or re.match(r"[a-z]+:", target):
            return match.group()
        path, hash, anchor = target.partition("#")
        linked = Path(os.path.normpath(page.parent / path))
        fault = None
        if not linked.exists() or not linked.is_relative_to(ROOT):
            fault = "does not exist in the repository"
        elif any(part.startswith(".") for part in linked.relative_to(ROOT).parts):
            fault = "is hidden, and the site leaves it out: name it without a link"
        if fault:
            line = text.count("\n", 0, match.start()) + 1
            self.problems.append(f"{page.relative_to(ROOT)}:{line}: {target} {fault}")
            return target
        readme = linked / "README.md"
        if linked.is_dir() and readme.exists():
            linked, path = readme, f"{path.rstrip('/')}/README.md"
        elif linked.is_dir():
            path = f"{path.rstrip('/')}/index.md"
        elif linked.suffix not in AS_IT_IS | {".md"}:
            path = f"{path}.md"
        self._waiting.append(linked)
        return path + hash + anchor


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def markdown_lists(text: str) -> str:
    """Lists as Python-Markdown wants them where GitHub is content with less.

    It takes four spaces to nest a list, and an empty line between a paragraph and a list.
    """
    lines: list[str] = []
    fenced = False
    for line in text.split("\n"):
        fenced ^= line.lstrip().startswith("```")
        item = None if fenced else ITEM.match(line)
        if item:
            indent = len(item["indent"])
            before = lines[-1] if lines else ""
            if indent in (2, 3):
                line = f"    {line.lstrip()}"
            elif not indent and before.strip() and before[0] not in " |<#" and not ITEM.match(before):
                lines += [] if _continues_item(lines) else [""]
        lines.append(line)
    return "\n".join(lines)


def _continues_item(lines: list[str]) -> bool:
    """Returns True if the last line belongs to an item of a list, which may go on without an indent."""
    for line in reversed(lines):
        if not line.strip():
            return False
        if ITEM.match(line):
            return True
    return False


def source_page(source: Path) -> str:
    """A page that shows a file. Search leaves it out."""
    text = source.read_text(encoding="utf-8")
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    language = LANGUAGES.get(source.suffix, "text")
    return f"{UNSEARCHED}# {source.relative_to(ROOT)}\n\n{fence}{language}\n{text.rstrip()}\n{fence}\n"


def folder_page(folder: Path) -> str:
    """A page that lists the files of a folder which git knows."""
    listed = subprocess.run(["git", "ls-files", "."], cwd=folder, capture_output=True, text=True, check=True)
    names = "\n".join(f"- `{name}`" for name in listed.stdout.splitlines())
    return f"{UNSEARCHED}# {folder.relative_to(ROOT)}/\n\n{names}\n"


def remote_resources() -> Iterator[str]:
    """Yields the tags of the site that fetch from the network: it must be readable without one."""
    for page in sorted(SITE.rglob("*.html")):
        text = page.read_text(encoding="utf-8")
        for tag in REMOTE.findall(text):
            if not NOT_FETCHED.search(tag):
                yield f"{page.relative_to(SITE)}: {tag}"


def main() -> None:
    shutil.rmtree(STAGE, ignore_errors=True)
    shutil.rmtree(SITE, ignore_errors=True)
    stage = Stage()
    stage.fill()
    stage.check_navigation()
    if stage.problems:
        sys.exit("\n".join(stage.problems))
    shutil.copyfile(CONFIG, BUILD / "mkdocs.yml")  # caches lie beside it
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    built = subprocess.run(command, cwd=BUILD, env={**os.environ, "NO_COLOR": "1"}, capture_output=True, text=True)
    output = re.sub(r"\x1b\[[0-9;]*m", "", built.stdout + built.stderr)
    if built.returncode:
        sys.exit(output.partition("Traceback")[0])
    print("".join(line for line in output.splitlines(True) if line.startswith("griffe:")), end="")  # about docstrings
    remote = list(remote_resources())
    if remote:
        sys.exit("\n".join(["the site fetches from the network:", *remote]))
    print(f"{SITE.relative_to(ROOT)}/index.html: {len(list(SITE.rglob('*.html')))} pages")


if __name__ == "__main__":
    main()
