"""The header of a GGUF file: counts, key-value pairs, and the place of each tensor.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian). The package `gguf`
(0.19, `gguf_reader.py`) trusts counts and lengths. Here each is compared with the bytes that are left, so that a
hostile or truncated file ends in one error. The weights behind the header are never read.

A quantized tensor is described as the rows of bytes that store it (`U8 [rows, bytes of a row]`), and by its type.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from distquant.checkpoint.faults import MOST_NAME, Faults, HeaderFault, long_name, shown
from distquant.checkpoint.headers import MAX_U64, ShardHeader, TensorInfo
from distquant.files import open_file
from distquant.stamps import Stamp

SUFFIX = ".gguf"
MAGIC, VERSIONS = b"GGUF", (2, 3)
FIRST_READ, MAX_HEADER_BYTES = 1 << 20, 1 << 30
MAX_DIMS = 4

TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18), 6: ("Q5_0", 32, 22), 8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
}  # fmt: skip
"""Type number -> (name, elements of a block, bytes of a block); `GGML_QUANT_SIZES` of gguf 0.19."""

OTHER_TYPES = {
    3: "Q4_1", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64",
    28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
"""Types that exist and are not supported here."""

BLOCKS: dict[str, tuple[int, int]] = {name: (elements, nbytes) for name, elements, nbytes in TYPES.values()}
"""Type name -> (elements of a block, bytes of a block)."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KEPT = {"general.architecture": str, "general.alignment": int, "split.count": int, "split.no": int}
"""The only values that are used here, with their types."""


class _Short(Exception):
    """Raised if the header does not end within the bytes that were read."""


class _Bad(Exception):
    """Raised if the header is invalid."""

    def __init__(self, fault: HeaderFault, reason: str, tensor: str | None = None):
        self.fault, self.reason, self.tensor = fault, reason, tensor


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The contents of a GGUF file's header.

    Attributes:
        shard: the header as that of any other checkpoint file; the digest is of all bytes before the tensors.
        types: name of the GGML type of each tensor.
        architecture: `general.architecture`; "" in further files of a split model.
        parts: number of files of the model.
        part: which of them this is, from 0.
        numbers: all single whole numbers among the values, by key.
    """

    shard: ShardHeader
    types: dict[str, str]
    architecture: str
    parts: int = 1
    part: int = 0
    numbers: dict[str, int] = field(default_factory=dict)


class _Cursor:
    """Reads the header's fields one after the other."""

    def __init__(self, data: bytes, size: int):
        self.data, self.size, self.position = data, size, 0

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > self.size:
            reason = f"at byte {self.position} its header asks for {count} bytes, and the file ends at {self.size}"
            raise _Bad(HeaderFault.HEADER_TOO_LONG_FOR_FILE, reason)
        if end > len(self.data):
            raise _Short
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

    def text(self, label: str) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise _Bad(HeaderFault.NOT_UTF8, f"{label} at byte {self.position - len(raw)} is not UTF-8") from error

    def count(self, label: str, least: int) -> int:
        """Reads a count of things that take at least `least` bytes each."""
        number = int(self.number("Q"))
        if number * least > self.size - self.position:  # before anything of that size is allocated
            reason = f"at byte {self.position - 8} it counts {number} {label}, more than the file has room for"
            raise _Bad(HeaderFault.HEADER_TOO_LONG_FOR_FILE, reason)
        return number

    def value(self, kind: int, nested: bool = False) -> Any:
        """Reads a value; an array is skipped, and None is returned."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text("a value")
        if kind != _ARRAY or nested:
            raise _Bad(HeaderFault.BAD_ENTRY, f"at byte {self.position} a value is of the unknown type {kind}")
        inner = self.number("I")
        if inner in _SCALARS:
            each = struct.calcsize("<" + _SCALARS[inner])
            self.take(self.count("values", each) * each)
        else:
            for _ in range(self.count("values", 8)):
                self.value(inner, nested=True)
        return None


def parse_gguf(path: str | os.PathLike[str], name: str, faults: Faults) -> GgufHeader | None:
    """Reads and checks a file's header; returns None after adding a problem to `faults`."""
    try:
        with os.fdopen(open_file(path), "rb", buffering=0) as file:
            stamp = Stamp.of(file.fileno())
            wanted = FIRST_READ
            while True:
                file.seek(0)
                data = _read(file, min(wanted, stamp.size))
                try:
                    return _header(data, stamp, name)
                except _Short:
                    # The format does not give the header's length. Reading four times as much again from the start
                    # costs at most a third more than the last read, and the parser needs no state.
                    if wanted >= MAX_HEADER_BYTES:
                        reason = f"its header is longer than {MAX_HEADER_BYTES} bytes"
                        faults.add(HeaderFault.HEADER_OVER_CAP, name, reason)
                        return None
                    wanted *= 4
    except OSError as error:
        faults.add(HeaderFault.UNREADABLE, name, f"cannot be read ({error.strerror or error})", fix="Check the path")
    except _Bad as bad:
        fix = "Use a file with supported types" if bad.fault is HeaderFault.UNKNOWN_DTYPE else ""
        faults.add(bad.fault, name, bad.reason, tensor=bad.tensor, fix=fix)
    return None


def _read(file: Any, count: int) -> bytes:
    data = bytearray()
    while len(data) < count and (chunk := file.read(count - len(data))):
        data += chunk
    return bytes(data)


def _header(data: bytes, stamp: Stamp, name: str) -> GgufHeader:
    size = stamp.size
    cursor = _Cursor(data, size)
    if size < 4 or cursor.take(4) != MAGIC:
        raise _Bad(HeaderFault.BAD_ENTRY, f"starts with {shown(data[:4])}, not with {MAGIC!r}")
    version = cursor.number("I")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        reason = "is big-endian" if swapped else f"is GGUF of version {version}"
        raise _Bad(HeaderFault.BAD_ENTRY, f"{reason}; little-endian files of versions 2 and 3 are read")
    tensors, pairs = cursor.count("tensors", 24), cursor.count("key-value pairs", 13)
    values, numbers = _values(cursor, pairs)
    entries = [_entry(cursor) for _ in range(tensors)]
    alignment = values.get("general.alignment", 32)
    if alignment <= 0 or alignment & (alignment - 1):
        raise _Bad(HeaderFault.BAD_ENTRY, f"general.alignment is {alignment}, not a power of two")
    start = -(-cursor.position // alignment) * alignment
    infos, types = _placed(entries, start, alignment, size, name)
    digest = hashlib.sha256(data[: cursor.position]).hexdigest()
    shard = ShardHeader(name=name, size=size, digest=digest, tensors=infos, metadata={}, stamp=stamp)
    parts, part = max(values.get("split.count", 1), 1), values.get("split.no", 0)
    return GgufHeader(shard, types, values.get("general.architecture", ""), parts, part, numbers)


def _values(cursor: _Cursor, count: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Reads the values of `_KEPT`, and all whole numbers; others are skipped."""
    seen: set[str] = set()
    kept: dict[str, Any] = {}
    numbers: dict[str, int] = {}
    for _ in range(count):
        key = cursor.text("a key")
        if key in seen:
            raise _Bad(HeaderFault.DUPLICATE_KEY, f"key {shown(key)} stands twice")
        seen.add(key)
        value = cursor.value(cursor.number("I"))
        if key in _KEPT:
            if type(value) is not _KEPT[key]:
                raise _Bad(HeaderFault.BAD_ENTRY, f"{key} is {shown(value)}, not {_KEPT[key].__name__}")
            kept[key] = value
        if type(value) is int:
            numbers[key] = value
    return kept, numbers


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Reads name, dims (outermost first), number of the type, and offset of one tensor."""
    name = cursor.text("a tensor's name")
    if len(name) > MOST_NAME:
        raise _Bad(HeaderFault.BAD_ENTRY, long_name(name), name)
    dims = cursor.number("I")
    if not 1 <= dims <= MAX_DIMS:
        raise _Bad(HeaderFault.BAD_ENTRY, f"has {dims} dims, not 1 to {MAX_DIMS}", name)
    shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]
    return name, shape, cursor.number("I"), cursor.number("Q")


def _placed(
    entries: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int, size: int, file: str
) -> tuple[tuple[TensorInfo, ...], dict[str, str]]:
    """Returns every tensor's place in the file, by rising offset, and its type."""
    infos: dict[str, TensorInfo] = {}
    types: dict[str, str] = {}
    for name, shape, number, offset in entries:
        if name in infos:
            raise _Bad(HeaderFault.DUPLICATE_KEY, "is described twice", name)
        if number not in TYPES:
            reason = f"unsupported type {OTHER_TYPES.get(number, number)}; supported are {', '.join(BLOCKS)}"
            raise _Bad(HeaderFault.UNKNOWN_DTYPE, reason, name)
        kind, block, nbytes = TYPES[number]
        count = 1
        for dim in shape:
            count *= dim
            if not 0 < count <= MAX_U64:
                raise _Bad(HeaderFault.OVERFLOW, f"shape {list(shape)} has 0 elements, or more than {MAX_U64}", name)
        if shape[-1] % block:
            reason = f"rows of {shape[-1]} elements are not a multiple of {kind}'s blocks of {block}"
            raise _Bad(HeaderFault.SIZE_MISMATCH, reason, name)
        total = count // block * nbytes
        if offset % alignment:
            raise _Bad(
                HeaderFault.OUT_OF_RANGE, f"offset {offset} is not a multiple of the alignment {alignment}", name
            )
        if start + offset + total > size:
            reason = f"ends at byte {start + offset + total}, and the file is only {size} bytes long"
            raise _Bad(HeaderFault.TRUNCATED, reason, name)
        types[name] = kind
        # Rows of blocks have no shape in elements that a reader could slice: they are described as rows of bytes.
        stored = shape if block == 1 else (*shape[:-1], shape[-1] // block * nbytes)
        dtype = kind if block == 1 else "U8"
        infos[name] = TensorInfo(name=name, dtype=dtype, shape=stored, file=file, offset=start + offset, nbytes=total)
    placed = sorted(infos.values(), key=lambda info: info.offset)
    for before, after in pairwise(placed):
        if before.offset + before.nbytes > after.offset:
            reason = f"starts at byte {after.offset}, before {shown(before.name)} ends"
            raise _Bad(HeaderFault.OVERLAP, reason, after.name)
    return tuple(placed), types
