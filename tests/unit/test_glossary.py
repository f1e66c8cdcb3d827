"""The package and its pages use the words of docs/glossary.md: none of the older ones comes back.

Identifiers are read by tokenize, docstrings and messages by ast, pages as text without their code. `RETIRED_*` are the
words; `EXEMPT` lists places where one of them is right. To see all offences of a package with file and line:

    python tests/unit/test_glossary.py [PATH ...]
"""

from __future__ import annotations

import ast
import io
import keyword
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, DOCS = ROOT / "distquant", ROOT / "docs"

RETIRED_IDENTIFIERS = {
    # the thing, and the word for it now
    "cut": "partition",
    "cuts": "partitions",
    "uncut": "replicated",
    "dealt": "assigned",
    "deal": "assign_reads",
    "deals": "assign_reads",
    "dealer": "ReadAssigner",
    "band": "row_layout",
    "bands": "row_layouts",
    "flow": "transfer",
    "flows": "transfers",
    "flowing": "encoded_components",
    "entire": "whole_weight_workspace",
    "turned": "transposed",
    "gathered": "replicated",
    "holders": "owners",
    "keepers": "owners",
    "skeleton": "description",
    "draft": "the stage of the plan",
    "ears": "message_handler",
    "board": "load_state",
    "arena": "staging_buffer",
    "ledger": "arrivals",
    "sized": "the name of its record",
    "straddling": "unaligned",
    "apart": "column_step",
    # words that say nothing
    "said": "the thing's own name",
    "told": "the thing's own name",
    "tell": "report, warn or collect",
    "tells": "report, warn or collect",
    "adopt": "load_prequantized",
    "settle": "load_encoded",
    "localize": "shard_modules",
    "refuse": "check",
    "refuses": "check",
}
"""Words of identifiers: parts between underscores or capitals. Also in upper case, and with a leading underscore."""

RETIRED_NAMES = {
    "at": "the thing's own name",
    "what": "the thing's own name",
    "units": "alignments",
    "spans": "block_shape",
    "Filling": "WeightPlacer",
    "Home": "Allocator",
}
"""Identifiers that are only wrong when they are the whole name."""

RARE_NAMES = {"found": 6}
"""Identifiers that a file may have so many times: a short search may call its result so."""

RETIRED_PHRASES = {
    r"\b(?:re|un)?cuts?\b|\bcutting\b": "partition, divide, shard",
    r"\bdeal(?:s|t|ing)? (?:it |them )?out\b|\bdealt\b": "assign, distribute",
    r"\b(?:is|are|was|were|be|been) told\b|\btold (?:apart|together|that|what|at)\b": "report",
    r"\b(?:is|are|was|were) said\b": "is given",
    r"(?<!there )\b(?:is|are) no(?! (?:longer|more|fewer|less)\b)\b": "is not, invalid, unknown",
    r"\bunits? of (?:\d+|\{)|\bwhole units?\b": "multiples of, alignment",
    r"\bskeletons?\b": "model description",
    r"\b(?:holders|keepers)\b": "owners",
    r"\bgets? (?:\w+ )?whole\b|\bwhole (?:on|to|for) (?:both|every|all)\b": "replicated",
    r"\bturned (?:ones|weights?|tensors?|round)\b": "transposed",
    r"\bbands?\b": "row layout",
}
"""Phrases of docstrings, comments, messages and pages -> the words for it now."""

RETIRED_FOR_USERS = {
    r"(?<![.\w(])staging\b": "load buffer; the option is `staging`",
    r"\bbusy\b": "time by stage",
    r"\blimited by place\b|\bplace \d+\.\d": "filling the model",
    r"\b(?:final|own|right) places?\b|(?:read|copied|directly) (?:in|into) (?:its |their )?place\b": "memory",
    r"\blies? (?:in|on|between|beside)\b": "is in",
}
"""Phrases of messages and pages -> words that users of transformers and vLLM know. Code may have its own for these."""

QUESTIONS = ("What", "Whether", "Who", "Whom", "Whose", "Which", "How", "Where", "Why", "When", "Tells", "Says")
"""First words that a docstring must not have: it starts with a verb or a noun."""

EXEMPT: dict[str, frozenset[str]] = {
    # "path below the repository": words or phrases that are right there, each with its reason beside it
    "distquant/errors.py": frozenset(("what",)),  # `Problem.what`, a public field: where, what, fix
    "distquant/planning/load_plan.py": frozenset(("cut", "cuts", "dealt")),  # old names of fields, for one release
}

KINDS = frozenset(("identifier", "docstring", "comment", "message"))

CHECKED: dict[str, frozenset[str]] = {
    ".": KINDS,  # the single files
    "accelerator": KINDS,
    "checkpoint": KINDS,
    "cli": KINDS,
    "config": KINDS,
    "kernels": KINDS,
    "loading": KINDS,
    "model": KINDS,
    "parallel": KINDS,
    "planning": KINDS,
    "progress": KINDS,
    "quantization": KINDS,
    "runtime": KINDS,
    "sharding": KINDS,
    "verification": KINDS,
}
"""Packages that are held to the words, and the kinds of places. Something under work can be left out for a while."""

PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md")
UNCHECKED_PAGES = ("docs/benchmarks.md",)
"""Made by a script from pages of results, which are not edited."""

LONGEST = 30
"""Words of a sentence on a page."""


@dataclass(frozen=True, slots=True)
class Offence:
    """A retired word at a place."""

    path: str
    line: int
    kind: str
    word: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.kind}: {self.word!r} ({self.remedy})"


# -- the package -------------------------------------------------------------------------------------------------------


def parts(identifier: str) -> list[str]:
    """Splits an identifier at underscores and capitals: `_ReadAssigner` is `read`, `assigner`."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", identifier)
    return [part.lower() for part in spaced.split("_") if part]


def identifiers(source: str) -> Iterator[tuple[str, int]]:
    """Yields the names in a file, and their lines. Attributes of other objects count where they are defined."""
    before: list[str] = ["", ""]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = token.type == tokenize.NAME and not keyword.iskeyword(token.string)
        if name and (before[1] != "." or before[0] in ("self", "cls")):
            yield token.string, token.start[0]
        before = [before[1], token.string]


def comments(source: str) -> Iterator[tuple[str, int]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string, token.start[0]


def docstrings(tree: ast.AST) -> Iterator[tuple[str, int, bool]]:
    """Yields docstrings, of attributes too, their lines, and whether they open a module, class or function."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for number, statement in enumerate(node.body):
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.value, statement.lineno, number == 0


def strings(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yields string constants with more than one word that are not docstrings; an f-string's values are `{}`."""
    skip = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skip |= {id(value) for value in node.values}
            text = "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skip:
            text = node.value
        else:
            continue
        if " " in text.strip():
            yield text, node.lineno


def phrases(text: str, *, for_users: bool = False) -> Iterator[tuple[str, str]]:
    """Yields retired phrases of a text, and the words for it now. Quoted code is left out."""
    prose = re.sub(r"``.+?``|`[^`\n]+`", "``", text)
    for pattern, remedy in {**RETIRED_PHRASES, **(RETIRED_FOR_USERS if for_users else {})}.items():
        for match in re.finditer(pattern, prose, re.IGNORECASE):
            yield match.group(), remedy


def offences_of_module(source: str, path: str) -> Iterator[Offence]:
    """Yields all retired words of a file."""
    exempt = EXEMPT.get(path, frozenset())
    names = [(name, line) for name, line in identifiers(source) if name not in exempt]
    rare = Counter(name for name, _ in names if name in RARE_NAMES)
    for name, line in names:
        retired = [part for part in parts(name) if part in RETIRED_IDENTIFIERS and part not in exempt]
        if name in RETIRED_NAMES:
            yield Offence(path, line, "identifier", name, RETIRED_NAMES[name])
        elif rare[name] > RARE_NAMES.get(name, 0):
            yield Offence(path, line, "identifier", name, f"{rare[name]} times in this file")
        elif retired:
            yield Offence(path, line, "identifier", name, RETIRED_IDENTIFIERS[retired[0]])
    tree = ast.parse(source)
    for text, line, opens in docstrings(tree):
        first = re.match(r"\W*(\w+)", text)
        if opens and first and first.group(1) in QUESTIONS:
            yield Offence(path, line, "docstring", first.group(1), "start with a verb or a noun")
        elif first and first.group(1) == "Whether":
            yield Offence(path, line, "docstring", "Whether", "True if ...")
        yield from (Offence(path, line, "docstring", *each) for each in phrases(text) if each[0].lower() not in exempt)
    for kind, texts in (("comment", comments(source)), ("message", strings(tree))):
        for text, line in texts:
            found = phrases(text, for_users=kind == "message")
            yield from (Offence(path, line, kind, *each) for each in found if each[0].lower() not in exempt)


def modules(name: str) -> list[Path]:
    """Returns the files of a package, at any depth; the single files of distquant for `.`."""
    return sorted((PACKAGE / name).glob("*.py" if name == "." else "**/*.py"))


# -- the pages ---------------------------------------------------------------------------------------------------------

FENCE = re.compile(
    r"^(```|~~~).*?^\1[^\S\n]*$|(?<=\n\n)(?: {4}[^\n]*\n)+|<!-- quality: begin -->.*?<!-- quality: end -->|<!--.*?-->",
    re.M | re.S,
)
"""Matches code, comments, and the part of a page that a script writes from messages of its time."""


def offences_of_page(text: str, path: str) -> Iterator[Offence]:
    """Yields retired phrases of a page outside of code, and sentences that are too long."""
    exempt = EXEMPT.get(path, frozenset())
    prose = FENCE.sub(lambda match: "\n" * match.group().count("\n"), text)
    for number, line in enumerate(prose.splitlines(), 1):
        found = phrases(line, for_users=True)
        yield from (Offence(path, number, "page", *each) for each in found if each[0].lower() not in exempt)
    for sentence, number in sentences(prose):
        count = len(re.findall(r"[\w`'’/=.-]*\w[\w`'’/=.-]*", sentence))
        if count > LONGEST:
            yield Offence(path, number, "page", f"{' '.join(sentence.split()[:6])} ...", f"{count} words in a sentence")


def sentences(prose: str) -> Iterator[tuple[str, int]]:
    """Yields the sentences of paragraphs and list items, and the line that each paragraph starts at. Tables, headings
    and enumerations in parentheses are left out, and links count as their text."""
    line = 1
    for paragraph in re.split(r"(\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) ))", prose):
        start, line = line, line + paragraph.count("\n")
        if not paragraph.strip() or paragraph.lstrip()[0] in "|#!<":
            continue
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", paragraph)
        text = re.sub(r"`[^`]*`", "`code`", text)
        text = re.sub(r"\([^()]*\)", "", text)
        text = re.sub(r"^\s*(?:[-*]|\d+\.) ", "", text)
        for sentence in re.split(r"(?<=[.!?:;])\**\s+", text):
            yield sentence, start


def pages() -> list[Path]:
    found = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    return [path for path in found if path.relative_to(ROOT).as_posix() not in UNCHECKED_PAGES]


# -- tests -------------------------------------------------------------------------------------------------------------


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def every(paths: list[Path]) -> list[Offence]:
    """Returns all offences of files and pages."""
    offences: list[Offence] = []
    for path in paths:
        of = offences_of_page if path.suffix == ".md" else offences_of_module
        offences += of(path.read_text(encoding="utf-8"), relative(path))
    return offences


@pytest.mark.parametrize("package", CHECKED)
def test_no_retired_word_comes_back(package: str) -> None:
    offences = [each for each in every(modules(package)) if each.kind in CHECKED[package]]
    assert not offences, "\n".join(map(str, ["", *offences]))


@pytest.mark.parametrize("page", pages(), ids=relative)
def test_pages_use_the_words_of_the_glossary(page: Path) -> None:
    offences = every([page])
    assert not offences, "\n".join(map(str, ["", *offences]))


def test_everything_in_the_package_is_checked() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages <= CHECKED.keys()
    assert [name for name in CHECKED if not modules(name)] == []
    assert {name for name, kinds in CHECKED.items() if kinds != KINDS} == set()


PLANTED = {
    "cut_dim = 1": ("identifier", "cut_dim"),
    "class BandSink: ...": ("identifier", "BandSink"),
    "def refuse_wrappers(): ...": ("identifier", "refuse_wrappers"),
    "found = 1\n" * (RARE_NAMES["found"] + 1): ("identifier", "found"),
    "class C:\n    def __init__(self):\n        self.band = 1": ("identifier", "band"),
    "DEALT = 'x'": ("identifier", "DEALT"),
    '"""Whether it works."""': ("docstring", "Whether"),
    'def f():\n    """How rows travel."""': ("docstring", "How"),
    'class C:\n    a: bool\n    """Whether it works."""': ("docstring", "Whether"),
    '"""The cuts of a dim."""': ("docstring", "cuts"),
    "x = 1  # dealt out over ranks": ("comment", "dealt out"),
    "raise ValueError(f'{x!r} is no known method')": ("message", "is no"),
    "raise ValueError('rows ' f'in units of {x}')": ("message", "units of {"),
    "print(f'{x} of staging memory')": ("message", "staging"),
    "print('loaded; limited by place')": ("message", "limited by place"),
    "print('rank', 'busy (s)')": ("message", "busy"),
    "print('copied into place')": ("message", "copied into place"),
}


@pytest.mark.parametrize("source", PLANTED)
def test_a_planted_word_is_found(source: str) -> None:
    offences = {(each.kind, each.word) for each in offences_of_module(source, "planted.py")}
    assert PLANTED[source] in offences


@pytest.mark.parametrize(
    "source",
    [
        "partition = shard_dim = 1",
        "execute = shortcut = 1",
        "found = look_at(whole, library.cut, problem.what)",
        '"""Returns how many rows there are, in the staging memory of a busy rank."""',
        "print('a smaller load buffer (staging)', '`staging` is too small')",
        "print('it is no longer there, and there is no other')",
        "print('`cut` is quoted code')",
        "key = 'cut'",
    ],
)
def test_other_words_are_left_alone(source: str) -> None:
    assert list(offences_of_module(source, "planted.py")) == []


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("A row-parallel cut is exact.", "cut"),
        ("Rows are dealt out.", "dealt out"),
        ("- this is no multiple of 64", "is no"),
        ("The boundary lies in a block.", "lies in"),
        ("It passes through the staging memory.", "staging"),
    ],
)
def test_a_planted_phrase_on_a_page_is_found(text: str, word: str) -> None:
    assert [each.word for each in offences_of_page(text, "docs/planted.md")][:1] == [word]


def test_a_long_sentence_on_a_page_is_found() -> None:
    long = " ".join(["word"] * (LONGEST + 1)) + "."
    assert len(list(offences_of_page(f"Short.\n\n{long}\n", "docs/planted.md"))) == 1
    code = f"```\n{long} A cut.\n```\n\n    {long}\n"
    assert not list(offences_of_page(code, "docs/planted.md"))
    assert len(list(offences_of_page(f"{code}\n{long}\n", "docs/planted.md"))) == 1


if __name__ == "__main__":
    named = [Path(name).resolve() for name in sys.argv[1:]]
    chosen = [path for name in named for path in (sorted(name.rglob("*.py")) if name.is_dir() else [name])]
    everything = [*(path for name in CHECKED for path in modules(name)), *pages()]
    print("\n".join(map(str, every(chosen or everything))))
