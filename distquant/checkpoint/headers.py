"""The header of one safetensors file: 8 bytes of little-endian length, then that many bytes of JSON.

Format: https://github.com/huggingface/safetensors#format. The checks are those of its `tensor.rs` (0.8). They are
strict also where the specification is stricter than that parser (first byte `{`, no duplicate keys), and where it
leaves room (unknown fields). All problems of a file are collected, and the weights behind the header are never read.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from typing import Any, NoReturn

from distquant.checkpoint.faults import MOST_NAME, Faults, HeaderFault, long_name, shown
from distquant.dtypes import DTYPE_BITS
from distquant.files import open_file
from distquant.stamps import Stamp
from distquant.strict_json import parse_json

MAX_HEADER_BYTES = 100_000_000  # `MAX_HEADER_SIZE` of safetensors' tensor.rs
LENGTH_BYTES = 8
MAX_U64 = 2**64 - 1

_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """The place of one tensor in a checkpoint.

    Attributes:
        name: name in the checkpoint.
        dtype: safetensors' spelling ("BF16", "F32", "U8", "F8_E4M3", ...), a key of `DTYPE_BITS`.
        shape: logical dims, row-major.
        file: file name relative to the checkpoint's folder.
        offset: byte at which it starts, from the start of the *file* (not of the data section).
        nbytes: length in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardHeader:
    """The contents of one file's header.

    Attributes:
        name: file name relative to the checkpoint's folder.
        size: size of the file in bytes.
        digest: SHA-256 (hex) of the header, its 8 length bytes included.
        tensors: all tensors, by rising offset.
        metadata: the strings of `__metadata__`.
        stamp: what the system said of the file right before its header was read.
    """

    name: str
    size: int
    digest: str
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    stamp: Stamp = field(compare=False)


def read_header(path: str | os.PathLike[str], name: str) -> ShardHeader:
    """Reads and checks the header of the file at `path`, known as `name` in its checkpoint and in messages.

    Raises:
        CheckpointError: lists every problem of the file.
    """
    faults = Faults("The file is damaged or was not fully written: download it again")
    header = parse_file(path, name, faults)
    faults.raise_if_any()
    assert header is not None
    return header


def parse_file(path: str | os.PathLike[str], name: str, faults: Faults) -> ShardHeader | None:
    """Like `read_header`, but adds problems to `faults`; the result is usable only if none were added."""
    try:
        read = _read_raw(path, name, faults)
    except OSError as error:
        faults.add(HeaderFault.UNREADABLE, name, f"cannot be read ({error.strerror or error})", fix="Check the path")
        return None
    if read is None:
        return None
    stamp, raw = read
    document = _parse_json(raw[LENGTH_BYTES:], name, faults)
    if document is None:
        return None
    metadata = _metadata(document.pop("__metadata__", None), name, faults)
    entries = [_entry(tensor, entry, name, len(raw), faults) for tensor, entry in document.items()]
    tensors = sorted((entry for entry in entries if entry is not None), key=lambda t: (t.offset, t.nbytes))
    # Without the bytes of an invalid entry the file seems to have a hole. That is not a second problem, so holes are
    # looked for only if every entry is valid.
    _check_layout(tensors, len(tensors) == len(entries), len(raw), stamp.size, name, faults)
    digest = hashlib.sha256(raw).hexdigest()
    return ShardHeader(
        name=name, size=stamp.size, digest=digest, tensors=tuple(tensors), metadata=metadata, stamp=stamp
    )


def _read_raw(path: str | os.PathLike[str], name: str, faults: Faults) -> tuple[Stamp, bytes] | None:
    """Reads the file's stamp, and then the header's bytes with their length prefix."""
    with os.fdopen(open_file(path), "rb", buffering=0) as file:
        stamp = Stamp.of(file.fileno())
        prefix = file.read(LENGTH_BYTES)
        if len(prefix) < LENGTH_BYTES:
            reason = f"is {len(prefix)} bytes long, and the header's length alone takes {LENGTH_BYTES}"
            faults.add(HeaderFault.TOO_SHORT, name, reason)
            return None
        length = int.from_bytes(prefix, "little")
        # The length is the file's own claim. It is compared with the cap before anything of that size is allocated.
        if length > MAX_HEADER_BYTES:
            reason = f"header of {length} bytes, over the cap of {MAX_HEADER_BYTES}"
            faults.add(HeaderFault.HEADER_OVER_CAP, name, f"{reason} (is it a safetensors file at all?)")
            return None
        raw = bytearray(prefix)
        while len(raw) < LENGTH_BYTES + length and (chunk := file.read(LENGTH_BYTES + length - len(raw))):
            raw += chunk
    if len(raw) < LENGTH_BYTES + length:
        reason = f"header of {length} bytes in a file of {stamp.size} bytes"
        faults.add(HeaderFault.HEADER_TOO_LONG_FOR_FILE, name, reason)
        return None
    return stamp, bytes(raw)


def _parse_json(raw: bytes, name: str, faults: Faults) -> dict[str, Any] | None:
    """Parses the header's JSON object; a duplicate key is a fault."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        reason = f"header byte {error.start} is {raw[error.start]:#04x}, which is not UTF-8"
        faults.add(HeaderFault.NOT_UTF8, name, reason)
        return None
    if not text.startswith("{"):
        faults.add(HeaderFault.NOT_JSON, name, f"header starts with {shown(text[:20])}, not with '{{'")
        return None
    try:
        return load_json(raw, name, faults)
    except ValueError as error:
        faults.add(HeaderFault.NOT_JSON, name, f"header is not JSON ({error})")
        return None


def load_json(text: str | bytes, name: str, faults: Faults) -> Any:
    """Parses strict JSON: adds `DUPLICATE_KEY` to `faults`; anything else outside RFC 8259 raises ValueError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        unique_pairs = dict(pairs)
        if len(unique_pairs) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    faults.add(HeaderFault.DUPLICATE_KEY, name, f"key {shown(key)} stands twice in one JSON object")
                seen.add(key)
        return unique_pairs

    def reject_constant(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a JSON number")

    return parse_json(text, object_pairs_hook=unique, parse_constant=reject_constant)


def _metadata(metadata: Any, name: str, faults: Faults) -> dict[str, str]:
    if metadata is None:  # absent, or null, which safetensors reads as absent
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        faults.add(HeaderFault.BAD_ENTRY, name, f"__metadata__ is {shown(metadata)}, not a map of strings to strings")
        return {}
    return metadata


def _entry(tensor: str, entry: Any, file: str, data_start: int, faults: Faults) -> TensorInfo | None:
    """Checks one tensor's entry; returns None if its place in the file is unknown."""
    if len(tensor) > MOST_NAME:
        faults.add(HeaderFault.BAD_ENTRY, file, long_name(tensor), tensor=tensor)
        return None
    if problem := _malformed(entry):
        faults.add(problem[0], file, problem[1], tensor=tensor)
        return None
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPE_BITS:
        reason = f"unknown dtype {shown(dtype)}; known are {', '.join(DTYPE_BITS)}"
        faults.add(HeaderFault.UNKNOWN_DTYPE, file, reason, tensor=tensor, fix="Use a newer distquant")
    elif problem := _wrong_size(dtype, shape, end - begin):
        faults.add(problem[0], file, problem[1], tensor=tensor)
    return TensorInfo(
        name=tensor, dtype=dtype, shape=tuple(shape), file=file, offset=data_start + begin, nbytes=end - begin
    )


def _malformed(entry: Any) -> tuple[HeaderFault, str] | None:
    """Returns the problem of an entry's types or offsets, if any."""
    # `type() is` and not isinstance: to isinstance a JSON true is an integer.
    if type(entry) is not dict or entry.keys() != _FIELDS:
        return HeaderFault.BAD_ENTRY, f"entry is {shown(entry)}, not an object of {sorted(_FIELDS)}"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str:
        return HeaderFault.BAD_ENTRY, f"dtype is {shown(dtype)}, not a string"
    if type(shape) is not list or not {*map(type, shape)} <= {int} or min(shape, default=0) < 0:
        return HeaderFault.BAD_ENTRY, f"shape is {shown(shape)}, not a list of integers from 0"
    if type(offsets) is not list or len(offsets) != 2 or not {*map(type, offsets)} <= {int}:
        return HeaderFault.BAD_ENTRY, f"data_offsets is {shown(offsets)}, not two integers"
    if max(offsets) > MAX_U64:
        return HeaderFault.OVERFLOW, f"data_offsets {shown(offsets)} exceed the largest offset, {MAX_U64}"
    if not 0 <= offsets[0] <= offsets[1]:
        return HeaderFault.OUT_OF_RANGE, f"data_offsets {shown(offsets)} are not 0 <= begin <= end"
    return None


def _wrong_size(dtype: str, shape: list[int], nbytes: int) -> tuple[HeaderFault, str] | None:
    """Returns the problem if a shape does not fit the bytes that the entry gives it."""
    elements = 1
    for dim in shape:
        elements *= dim
        if max(elements, dim) > MAX_U64:  # at each step, as tensor.rs does: a later 0 does not make it valid
            return HeaderFault.OVERFLOW, f"shape {shown(shape)} of {dtype} has more than {MAX_U64} elements"
    bits = elements * DTYPE_BITS[dtype]
    if bits > MAX_U64:
        return HeaderFault.OVERFLOW, f"shape {shown(shape)} of {dtype} takes {bits} bits, over {MAX_U64}"
    if bits % 8:
        return HeaderFault.MISALIGNED, f"shape {shown(shape)} of {dtype} takes {bits} bits, not whole bytes"
    if bits // 8 != nbytes:
        reason = f"shape {shown(shape)} of {dtype} takes {bits // 8} bytes, and data_offsets span {nbytes}"
        return HeaderFault.SIZE_MISMATCH, reason
    return None


def _check_layout(
    tensors: list[TensorInfo], complete: bool, data_start: int, size: int, file: str, faults: Faults
) -> None:
    """Checks that the tensors, sorted by offset, cover the data section once, without a hole, up to the file's end."""
    # `covered` never goes back: a tensor inside an earlier one must not hide an overlap with the next.
    covered, last = data_start, ""
    for tensor in tensors:
        if tensor.offset < covered:
            reason = f"starts at byte {tensor.offset}, before {shown(last)} ends at {covered}"
            faults.add(HeaderFault.OVERLAP, file, reason, tensor=tensor.name)
        elif tensor.offset > covered and complete:
            reason = f"starts at byte {tensor.offset}, and the bytes from {covered} on belong to no tensor"
            faults.add(HeaderFault.NOT_CONTIGUOUS, file, reason, tensor=tensor.name)
        if tensor.offset + tensor.nbytes > covered:
            covered, last = tensor.offset + tensor.nbytes, tensor.name
    if covered > size:
        first = next(tensor for tensor in tensors if tensor.offset + tensor.nbytes > size)
        end = first.offset + first.nbytes
        reason = f"ends at byte {end}, the last tensor at {covered}, and the file is only {size} bytes long"
        faults.add(HeaderFault.TRUNCATED, file, reason, tensor=first.name)
    elif covered < size and complete:
        reason = f"file is {size} bytes long, and its last tensor ends at {covered}"
        faults.add(HeaderFault.TRAILING_BYTES, file, reason)
