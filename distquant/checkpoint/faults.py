"""Faults of a checkpoint: a closed set, so that tests and callers match members and not prose.

The members for headers refine `SafeTensorError` of safetensors 0.8 (`tensor.rs`). Its `MetadataIncompleteBuffer`, for
example, is one of three here: a hole, a truncated file, or trailing bytes.
"""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from distquant.errors import InputError, Problem

LISTED_PER_KIND = 20  # problems of one kind listed for one file; the rest are counted in a last line
NAME_SHOWN = 250  # characters of a name in a message; no file system has longer file names

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = NAME_SHOWN
_repr.maxlist = _repr.maxtuple = 12


def shown(value: object) -> str:
    """Returns a bounded `repr`, because a hostile file chooses the value."""
    return _repr.repr(value)


class HeaderFault(str, Enum):
    """Kinds of faults in the files of a checkpoint."""

    # one safetensors file
    UNREADABLE = "unreadable"  # the operating system refuses, or it is not a regular file
    TOO_SHORT = "too_short"  # fewer than the 8 bytes of the header length
    HEADER_OVER_CAP = "header_over_cap"  # longer than the 100 MB that safetensors reads
    HEADER_TOO_LONG_FOR_FILE = "header_too_long_for_file"
    NOT_UTF8 = "not_utf8"
    NOT_JSON = "not_json"  # or not an object that starts at the first byte
    DUPLICATE_KEY = "duplicate_key"
    BAD_ENTRY = "bad_entry"  # wrong types, missing or unknown fields
    UNKNOWN_DTYPE = "unknown_dtype"
    OVERFLOW = "overflow"  # a number past 64 bits
    MISALIGNED = "misaligned"  # a sub-byte tensor that does not end on a byte
    SIZE_MISMATCH = "size_mismatch"  # data_offsets span against dtype x shape
    OUT_OF_RANGE = "out_of_range"  # data_offsets negative or reversed
    OVERLAP = "overlap"
    NOT_CONTIGUOUS = "not_contiguous"  # a hole between tensors
    TRUNCATED = "truncated"  # the file ends before its tensors do
    TRAILING_BYTES = "trailing_bytes"
    # the folder
    NO_CHECKPOINT = "no_checkpoint"
    NOT_IN_CACHE = "not_in_cache"
    CONFIG_MISSING = "config_missing"
    CONFIG_NOT_JSON = "config_not_json"
    CONFIG_INCOMPLETE = "config_incomplete"  # a quantization config in a file of its own that says too little
    # the index
    INDEX_NOT_JSON = "index_not_json"
    INDEX_BAD_ENTRY = "index_bad_entry"
    PATH_ESCAPES = "path_escapes"
    SHARD_MISSING = "shard_missing"
    TENSOR_NOT_IN_SHARD = "tensor_not_in_shard"
    TENSOR_IN_TWO_SHARDS = "tensor_in_two_shards"


@dataclass(frozen=True, slots=True)
class Fault(Problem):
    """A `Problem` with its kind.

    Attributes:
        fault: the kind.
        file: name of the file (or the folder) that has it.
    """

    fault: HeaderFault
    file: str


class CheckpointError(InputError):
    """The checkpoint cannot be used. `problems` are `Fault`s, `faults` their kinds in the same order."""

    problems: tuple[Fault, ...]

    def __init__(self, problems: Iterable[Fault]):
        super().__init__(problems)
        self.faults: tuple[HeaderFault, ...] = tuple(problem.fault for problem in self.problems)

    @classmethod
    def one(cls, where: str, reason: str, fix: str, fault: HeaderFault) -> CheckpointError:  # type: ignore[override]
        """The error with a single problem."""
        return cls([Fault(where, reason, fix, fault, where)])


MOST_NAME = 1000
"""Characters of a tensor's name at most; a name of many dots is taken apart in time that grows with its square."""


def long_name(name: str) -> str:
    """Returns what is wrong with a tensor's name of more than `MOST_NAME` characters."""
    return f"name of {len(name)} characters, and at most {MOST_NAME} are read"


class Faults:
    """Collects faults: at most `LISTED_PER_KIND` of one kind in one file, so that 90,000 lines become 20 and a count.

    Attributes:
        damaged: advice for a file whose bytes are wrong. The opener gives it, because only it knows the file's origin.
    """

    def __init__(self, damaged: str) -> None:
        self.damaged = damaged
        self._listed: list[Fault] = []
        self._counts: Counter[tuple[HeaderFault, str]] = Counter()

    def add(self, fault: HeaderFault, file: str, reason: str, *, tensor: str | None = None, fix: str = "") -> None:
        self._counts[fault, file] += 1
        if self._counts[fault, file] <= LISTED_PER_KIND:
            where = file[:NAME_SHOWN] if tensor is None else f"{file[:NAME_SHOWN]}: tensor {shown(tensor)}"
            self._listed.append(Fault(where, reason, fix or self.damaged, fault, file))

    def __bool__(self) -> bool:
        return bool(self._listed)

    def __iter__(self) -> Iterator[Fault]:
        yield from self._listed
        for (fault, file), count in self._counts.items():
            if count > LISTED_PER_KIND:
                yield Fault(file, f"{count - LISTED_PER_KIND} more problems ({fault.value})", self.damaged, fault, file)

    def take(self, faults: Iterable[Fault]) -> None:
        """Adds faults that were found before it was known if they matter."""
        self._listed += faults

    def raise_if_any(self) -> None:
        """Raises `CheckpointError` with everything collected so far, if there is anything."""
        if self:
            raise CheckpointError(self)
