"""One file: sound ones read as safetensors reads them, hostile ones refused by name."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from checkpoint_files import entry, safetensors_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import distquant.checkpoint
from distquant.checkpoint import DTYPE_BITS, CheckpointError, HeaderFault, read_header
from distquant.checkpoint.faults import LISTED_PER_KIND
from distquant.errors import InputError

A = entry("U8", [4], 0, 4)
FOUR = bytes(4)
PAST_U64 = 2**64


def both(first: dict[str, Any], second: dict[str, Any], data: int) -> bytes:
    return safetensors_bytes({"a": first, "b": second}, bytes(data))


# name -> (file, fault, what the message must show)
HOSTILE: dict[str, tuple[bytes, HeaderFault, str]] = {
    "empty file": (b"", HeaderFault.TOO_SHORT, r"0 bytes long.* 8"),
    "seven bytes": (bytes(7), HeaderFault.TOO_SHORT, r"7 bytes long"),
    "header past the end": (
        (50).to_bytes(8, "little") + b"{}",
        HeaderFault.HEADER_TOO_LONG_FOR_FILE,
        r"50 bytes in a file of 10",
    ),
    "header over the cap": (
        (100_000_001).to_bytes(8, "little") + b"{}",
        HeaderFault.HEADER_OVER_CAP,
        r"100000001.*100000000",
    ),
    "an HTML page": (b"<!DOCTYPE html><html></html>", HeaderFault.HEADER_OVER_CAP, r"a safetensors file at all"),
    "header length of all ones": (b"\xff" * 8 + b"{}", HeaderFault.HEADER_OVER_CAP, str(2**64 - 1)),
    "not utf-8": (safetensors_bytes(b'{"\xff": 1}'), HeaderFault.NOT_UTF8, r"byte 2 is 0xff"),
    "no bytes of header": (safetensors_bytes(b""), HeaderFault.NOT_JSON, r"starts with ''"),
    "a list": (safetensors_bytes("[1]"), HeaderFault.NOT_JSON, r"starts with '\[1\]'"),
    "a space first": (safetensors_bytes(" {}"), HeaderFault.NOT_JSON, r"starts with ' \{\}'"),
    "truncated JSON": (safetensors_bytes('{"a": '), HeaderFault.NOT_JSON, r"not JSON \(.*column"),
    "text after the object": (safetensors_bytes("{} x"), HeaderFault.NOT_JSON, r"Extra data"),
    "NaN": (safetensors_bytes('{"a": NaN}'), HeaderFault.NOT_JSON, r"NaN is not a JSON number"),
    "lone surrogate": (safetensors_bytes('{"\\ud800": 1}'), HeaderFault.NOT_JSON, r"lone surrogate"),
    "a number of 5000 digits": (safetensors_bytes('{"a": ' + "9" * 5000 + "}"), HeaderFault.NOT_JSON, r"digits"),
    "nested 100,000 deep": (
        safetensors_bytes('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"),
        HeaderFault.NOT_JSON,
        r"nested too deeply",
    ),
    "a tensor twice": (
        safetensors_bytes(
            '{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]},'
            ' "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}',
            FOUR,
        ),
        HeaderFault.DUPLICATE_KEY,
        r"'a' stands twice",
    ),
    "a field twice": (
        safetensors_bytes('{"a": {"dtype": "I8", "dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}', FOUR),
        HeaderFault.DUPLICATE_KEY,
        r"'dtype' stands twice",
    ),
    "entry is a number": (safetensors_bytes({"a": 7}), HeaderFault.BAD_ENTRY, r"'a': entry is 7"),
    "entry is a list": (
        safetensors_bytes({"a": ["U8", [4], [0, 4]]}, FOUR),
        HeaderFault.BAD_ENTRY,
        r"'a': entry is \[",
    ),
    "no shape": (safetensors_bytes({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, FOUR), HeaderFault.BAD_ENTRY, "'a'"),
    "unknown field": (safetensors_bytes({"a": {**A, "order": "F"}}, FOUR), HeaderFault.BAD_ENTRY, r"'order': 'F'"),
    "dtype is a number": (safetensors_bytes({"a": {**A, "dtype": 8}}, FOUR), HeaderFault.BAD_ENTRY, r"dtype is 8"),
    "shape is a number": (safetensors_bytes({"a": {**A, "shape": 4}}, FOUR), HeaderFault.BAD_ENTRY, r"shape is 4"),
    "negative dim": (safetensors_bytes({"a": {**A, "shape": [-4]}}, FOUR), HeaderFault.BAD_ENTRY, r"shape is \[-4\]"),
    "dim is true": (safetensors_bytes({"a": {**A, "shape": [True, 4]}}, FOUR), HeaderFault.BAD_ENTRY, r"\[True, 4\]"),
    "dim is 4.0": (safetensors_bytes({"a": {**A, "shape": [4.0]}}, FOUR), HeaderFault.BAD_ENTRY, r"\[4\.0\]"),
    "one offset": (
        safetensors_bytes({"a": {**A, "data_offsets": [4]}}, FOUR),
        HeaderFault.BAD_ENTRY,
        r"offsets is \[4\]",
    ),
    "three offsets": (safetensors_bytes({"a": {**A, "data_offsets": [0, 4, 8]}}, FOUR), HeaderFault.BAD_ENTRY, "4, 8"),
    "offset is a string": (safetensors_bytes({"a": {**A, "data_offsets": [0, "4"]}}), HeaderFault.BAD_ENTRY, "'4'"),
    "metadata is a list": (safetensors_bytes({"__metadata__": [1]}), HeaderFault.BAD_ENTRY, r"__metadata__ is \[1\]"),
    "metadata holds a number": (safetensors_bytes({"__metadata__": {"k": 5}}), HeaderFault.BAD_ENTRY, r"\{'k': 5\}"),
    "unknown dtype": (safetensors_bytes({"a": {**A, "dtype": "U7"}}, FOUR), HeaderFault.UNKNOWN_DTYPE, r"'U7'.*BF16"),
    "dtype in lower case": (safetensors_bytes({"a": {**A, "dtype": "u8"}}, FOUR), HeaderFault.UNKNOWN_DTYPE, r"'u8'"),
    "dim past 64 bits": (safetensors_bytes({"a": entry("U8", [PAST_U64], 0, 0)}), HeaderFault.OVERFLOW, str(PAST_U64)),
    "product past 64 bits": (
        safetensors_bytes({"a": entry("U8", [2**40, 2**40], 0, 0)}),
        HeaderFault.OVERFLOW,
        str(2**40),
    ),
    "product past 64 bits, then 0": (
        safetensors_bytes({"a": entry("U8", [2**40, 2**40, 0], 0, 0)}),
        HeaderFault.OVERFLOW,
        r"1099511627776, 0\]",
    ),
    "bits past 64 bits": (safetensors_bytes({"a": entry("F32", [2**62], 0, 0)}), HeaderFault.OVERFLOW, str(2**67)),
    "offset past 64 bits": (
        safetensors_bytes({"a": entry("U8", [4], 0, PAST_U64)}, FOUR),
        HeaderFault.OVERFLOW,
        str(PAST_U64),
    ),
    "half a byte": (safetensors_bytes({"a": entry("F4", [3], 0, 1)}, bytes(1)), HeaderFault.MISALIGNED, r"12 bits"),
    "span too long": (
        safetensors_bytes({"a": entry("F32", [2], 0, 9)}, bytes(9)),
        HeaderFault.SIZE_MISMATCH,
        r"8 bytes.* 9",
    ),
    "span too short": (
        safetensors_bytes({"a": entry("F32", [2], 0, 4)}, FOUR),
        HeaderFault.SIZE_MISMATCH,
        r"\[2\] of F32.*8 bytes.*4",
    ),
    "reversed offsets": (safetensors_bytes({"a": entry("U8", [4], 4, 0)}, FOUR), HeaderFault.OUT_OF_RANGE, r"\[4, 0\]"),
    "negative offset": (safetensors_bytes({"a": entry("U8", [4], -4, 0)}), HeaderFault.OUT_OF_RANGE, r"\[-4, 0\]"),
    "same bytes twice": (both(A, A, 4), HeaderFault.OVERLAP, r"'b': starts at byte \d+, before 'a' ends"),
    "bytes shared by halves": (both(A, entry("U8", [4], 2, 6), 6), HeaderFault.OVERLAP, r"'b'.*before 'a'"),
    "one inside the other": (both(entry("U8", [8], 0, 8), entry("U8", [2], 2, 4), 8), HeaderFault.OVERLAP, r"'b'.*'a'"),
    "empty one inside another": (both(A, entry("U8", [0], 2, 2), 4), HeaderFault.OVERLAP, r"'b'.*before 'a'"),
    "hole between": (both(A, entry("U8", [4], 5, 9), 9), HeaderFault.NOT_CONTIGUOUS, r"'b'.*belong to no tensor"),
    "hole at the start": (
        safetensors_bytes({"a": entry("U8", [4], 1, 5)}, bytes(5)),
        HeaderFault.NOT_CONTIGUOUS,
        "'a'",
    ),
    "truncated data": (
        both(A, entry("U8", [4], 4, 8), 7),
        HeaderFault.TRUNCATED,
        r"'b': ends at byte \d+.*only \d+ bytes",
    ),
    "offsets at the end of the world": (
        safetensors_bytes({"a": entry("U8", [2**60], 0, 2**60)}, FOUR),
        HeaderFault.TRUNCATED,
        r"only \d+ bytes long",
    ),
    "bytes too many": (safetensors_bytes({"a": A}, bytes(5)), HeaderFault.TRAILING_BYTES, r"file is \d+ bytes long"),
    "bytes, and no tensor": (safetensors_bytes({}, FOUR), HeaderFault.TRAILING_BYTES, r"14 bytes long.* 10"),
}

# stricter than safetensors' parser on purpose: the spec forbids these, or does not provide for them
LENIENT_UPSTREAM = {"a space first", "a tensor twice", "entry is a list", "unknown field", "NaN"}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file(case: str, tmp_path: Path) -> None:
    data, fault, shows = HOSTILE[case]
    path = tmp_path / "bad-00001.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_header(path, path.name)
    assert caught.value.faults == (fault,)  # one cause, one problem: no cascade
    message = str(caught.value)
    assert message.startswith("bad-00001.safetensors: ")
    assert re.search(shows, message)
    assert "download it again" in message or "newer distquant" in message


@pytest.mark.parametrize("case", sorted(HOSTILE.keys() - LENIENT_UPSTREAM))
def test_safetensors_refuses_it_too(case: str) -> None:
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(HOSTILE[case][0])


def test_every_header_fault_has_a_hostile_file() -> None:
    members = list(HeaderFault)
    of_one_file = set(members[: members.index(HeaderFault.NO_CHECKPOINT)]) - {HeaderFault.UNREADABLE}
    assert {fault for _, fault, _ in HOSTILE.values()} == of_one_file


def test_all_problems_of_a_file_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    header = {"a": {**A, "dtype": "U7"}, "b": entry("F32", [3], 4, 8), "c": 1, "d": entry("U8", [4], 6, 10)}
    path.write_bytes(safetensors_bytes(header, bytes(8)))
    with pytest.raises(CheckpointError) as caught:
        read_header(path, "m.safetensors")
    expected = ["UNKNOWN_DTYPE", "SIZE_MISMATCH", "BAD_ENTRY", "OVERLAP", "TRUNCATED"]
    assert [fault.name for fault in caught.value.faults] == expected
    assert str(caught.value).startswith("5 problems:")


def test_many_problems_of_a_kind_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors_bytes({f"t{i}": i for i in range(LISTED_PER_KIND + 7)}))
    with pytest.raises(CheckpointError, match=r"7 more problems \(bad_entry\)") as caught:
        read_header(path, "m.safetensors")
    assert len(caught.value.problems) == LISTED_PER_KIND + 1


def test_hostile_values_do_not_flood_the_message(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors_bytes({"n" * 100_000: {"dtype": "D" * 100_000, "shape": [1] * 9999, "x": 0}}))
    with pytest.raises(CheckpointError) as caught:
        read_header(path, "m.safetensors")
    assert len(str(caught.value)) < 2000


def test_error_survives_pickling(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(both(A, A, 3))
    with pytest.raises(CheckpointError) as caught:
        read_header(path, "m.safetensors")
    sent = pickle.loads(pickle.dumps(caught.value))
    assert type(sent) is CheckpointError and isinstance(sent, InputError)
    assert sent.faults == caught.value.faults == (HeaderFault.OVERLAP, HeaderFault.TRUNCATED)
    assert sent.problems == caught.value.problems
    assert str(sent) == str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, shows in ((tmp_path / "none", "No such file"), (tmp_path, "regular"), (tmp_path / "pipe", "regular")):
        with pytest.raises(CheckpointError, match=rf"shard: .*{shows}") as caught:
            read_header(path, "shard")
        assert caught.value.faults == (HeaderFault.UNREADABLE,)


def test_reads_no_byte_past_the_header(tmp_path: Path) -> None:
    """A sparse file of 1 TiB would take minutes and more memory than there is."""
    path = tmp_path / "huge.safetensors"
    path.write_bytes(safetensors_bytes({"w": entry("U8", [2**20, 2**20], 0, 2**40)}))
    start = path.stat().st_size
    os.truncate(path, start + 2**40)
    header = read_header(path, path.name)
    (tensor,) = header.tensors
    assert (tensor.offset, tensor.nbytes, header.size) == (start, 2**40, start + 2**40)


TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}


def assert_reads_as_safetensors_does(path: Path) -> None:
    """Names, shapes, dtypes and bytes against safetensors' own parser."""
    data = path.read_bytes()
    header = read_header(path, path.name)
    theirs = dict(safetensors.deserialize(data))
    assert {tensor.name for tensor in header.tensors} == theirs.keys()
    for tensor in header.tensors:
        their = theirs[tensor.name]
        assert (list(tensor.shape), tensor.dtype) == (their["shape"], their["dtype"])
        assert data[tensor.offset : tensor.offset + tensor.nbytes] == bytes(their["data"])
    length = 8 + int.from_bytes(data[:8], "little")
    assert header.digest == hashlib.sha256(data[:length]).hexdigest()
    assert header.size == len(data)


def test_file_of_save_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.manual_seed(0)
    tensors = {f"of.{name}": (torch.rand(3, 5) * 9).to(dtype) for name, dtype in TORCH_DTYPES.items()}
    save_file({**tensors, "scalar": torch.tensor(1.5), "none": torch.empty(0, 7)}, path, metadata={"format": "pt"})
    assert_reads_as_safetensors_does(path)
    header = read_header(path, path.name)
    by_name = {tensor.name: tensor for tensor in header.tensors}
    assert header.metadata == {"format": "pt"}
    assert (by_name["scalar"].shape, by_name["scalar"].nbytes) == ((), 4)
    assert (by_name["none"].shape, by_name["none"].nbytes) == ((0, 7), 0)
    for name, dtype in TORCH_DTYPES.items():
        assert by_name[f"of.{name}"].dtype == name
        assert by_name[f"of.{name}"].nbytes == 15 * dtype.itemsize


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_bits_of_every_dtype(dtype: str, tmp_path: Path) -> None:
    """Eight elements take as many bytes as one takes bits; safetensors agrees, and refuses one byte less."""
    bits = DTYPE_BITS[dtype]
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors_bytes({"a": entry(dtype, [8], 0, bits)}, bytes(bits)))
    assert read_header(path, "m").tensors[0].nbytes == bits
    assert [name for name, _ in safetensors.deserialize(path.read_bytes())] == ["a"]
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(safetensors_bytes({"a": entry(dtype, [8], 0, bits - 1)}, bytes(bits - 1)))


def test_no_dtype_of_safetensors_is_missing() -> None:
    """Its parser lists the dtypes it knows when it meets another one."""
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.deserialize(safetensors_bytes({"a": {**A, "dtype": "X"}}, FOUR))
    listed = re.findall(r"`(\w+)`", str(caught.value).partition("expected one of")[2])
    assert set(listed) == DTYPE_BITS.keys()


names = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), shapes), max_size=12), st.booleans())
def test_random_files_read_as_safetensors_reads_them(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[str, list[int]]], metadata: bool
) -> None:
    path = tmp_path_factory.mktemp("random") / "m.safetensors"
    made = {name: torch.ones(shape).to(TORCH_DTYPES[dtype]) for name, (dtype, shape) in tensors.items()}
    save_file(made, path, metadata={"é": "\n"} if metadata else None)
    assert_reads_as_safetensors_does(path)


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.sampled_from(["U8", "F4", "BF16"]), st.integers(0, 4)), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    victim=st.integers(0, 3),
    nudges=st.tuples(*[st.sampled_from([0, 0, 0, 1, -1])] * 4),
)
def test_accepts_exactly_what_safetensors_accepts(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[tuple[str, int]],
    order: random.Random,
    victim: int,
    nudges: tuple[int, int, int, int],
) -> None:
    """Sound layouts, with a dim, an offset or the file's length moved by one in some of them."""
    made, end = [], 0
    for dtype, dim in sizes:
        nbytes = dim * DTYPE_BITS[dtype] * 2 // 8
        made.append(entry(dtype, [dim, 2], end, end + nbytes))
        end += nbytes
    moved = made[victim % len(made)]
    moved["shape"][0] = max(0, moved["shape"][0] + nudges[0])
    moved["data_offsets"][0] = max(0, moved["data_offsets"][0] + nudges[1])
    moved["data_offsets"][1] = max(0, moved["data_offsets"][1] + nudges[2])
    order.shuffle(made)
    path = tmp_path_factory.mktemp("layout") / "m.safetensors"
    path.write_bytes(safetensors_bytes({f"t{i}": e for i, e in enumerate(made)}, bytes(max(0, end + nudges[3]))))
    try:
        safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError:
        with pytest.raises(CheckpointError):
            read_header(path, "m.safetensors")
    else:
        assert_reads_as_safetensors_does(path)


def test_import_is_lean() -> None:
    """With an empty parent package, since `distquant/__init__.py` may import what it likes."""
    code = (
        "import sys, types; parent = sys.modules['distquant'] = types.ModuleType('distquant');"
        "parent.__path__ = [sys.argv[1]]; import distquant.checkpoint;"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    package = Path(distquant.checkpoint.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, package], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "distquant" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "safetensors", "huggingface_hub", "numpy"})
