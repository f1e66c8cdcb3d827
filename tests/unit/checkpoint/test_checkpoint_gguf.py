"""GGUF headers: the contents of a good file, and one clear error for every hostile or truncated file."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from distquant.checkpoint import CheckpointError, open_checkpoint
from distquant.checkpoint.faults import HeaderFault

GOLDEN = Path(__file__).parents[2] / "data" / "gguf" / "tiny.gguf"


def good(path: Path) -> bytes:
    """A small file of two tensors."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_array("general.tags", ["a", "b"])
    weight = np.arange(128, dtype=np.float32).reshape(2, 64)
    words = quants.quantize(weight, GGMLQuantizationType.Q4_0)
    writer.add_tensor("blk.0.ffn_up.weight", words, raw_dtype=GGMLQuantizationType.Q4_0)
    writer.add_tensor("output_norm.weight", np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_places_are_those_of_the_package(tmp_path):
    for path in (GOLDEN, tmp_path / "small.gguf"):
        if path != GOLDEN:
            good(path)
        checkpoint = open_checkpoint(path)
        theirs = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
        assert checkpoint.tensors.keys() == theirs.keys()
        for name, info in checkpoint.tensors.items():
            tensor = theirs[name]
            assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
            assert checkpoint.types[name] == tensor.tensor_type.name
            if info.dtype == "U8":
                assert info.shape == tensor.data.shape
        assert checkpoint.folder / path.name == path
        assert checkpoint.digests()[path.name][1] == path.stat().st_size


def swap(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1 and len(old) == len(new)
    return data.replace(old, new)


UP = b"blk.0.ffn_up.weight"
DIMS = struct.pack("<IQQ", 2, 64, 2)

HOSTILE = {
    "no magic": (lambda d: b"GGUX" + d[4:], HeaderFault.BAD_ENTRY, "not with b'GGUF'"),
    "empty": (lambda d: b"", HeaderFault.BAD_ENTRY, "not with b'GGUF'"),
    "version": (lambda d: d[:4] + struct.pack("<I", 9) + d[8:], HeaderFault.BAD_ENTRY, "version 9"),
    "big-endian": (lambda d: d[:4] + struct.pack(">I", 3) + d[8:], HeaderFault.BAD_ENTRY, "big-endian"),
    "tensor count": (
        lambda d: d[:8] + struct.pack("<Q", 1 << 60) + d[16:],
        HeaderFault.HEADER_TOO_LONG_FOR_FILE,
        "counts 1152921504606846976 tensors",
    ),
    "key count": (
        lambda d: d[:16] + struct.pack("<Q", 1 << 40) + d[24:],
        HeaderFault.HEADER_TOO_LONG_FOR_FILE,
        "key-value pairs",
    ),
    "key length": (
        lambda d: d[:24] + struct.pack("<Q", 1 << 50) + d[32:],
        HeaderFault.HEADER_TOO_LONG_FOR_FILE,
        "asks for 1125899906842624 bytes",
    ),
    "key bytes": (lambda d: d[:32] + b"\xff\xfe" + d[34:], HeaderFault.NOT_UTF8, "not UTF-8"),
    "truncated in the header": (lambda d: d[:100], HeaderFault.HEADER_TOO_LONG_FOR_FILE, "the file ends at 100"),
    "truncated in the weights": (lambda d: d[:-100], HeaderFault.TRUNCATED, "only .* bytes long"),
    "array length": (
        lambda d: swap(d, struct.pack("<IIQQ", 9, 8, 2, 1), struct.pack("<IIQQ", 9, 8, 1 << 61, 1)),
        HeaderFault.HEADER_TOO_LONG_FOR_FILE,
        "values, more than the file has room for",
    ),
    "nested arrays": (
        lambda d: swap(d, struct.pack("<IIQQ", 9, 8, 2, 1), struct.pack("<IIQQ", 9, 9, 2, 1)),
        HeaderFault.BAD_ENTRY,
        "unknown type 9",
    ),
    "dims": (lambda d: swap(d, DIMS, struct.pack("<IQQ", 99, 64, 2)), HeaderFault.BAD_ENTRY, "99 dims"),
    "too many elements": (
        lambda d: swap(d, DIMS, struct.pack("<IQQ", 2, 1 << 40, 1 << 40)),
        HeaderFault.OVERFLOW,
        "more than",
    ),
    "no elements": (lambda d: swap(d, DIMS, struct.pack("<IQQ", 2, 64, 0)), HeaderFault.OVERFLOW, "has 0 elements"),
    "half a block": (lambda d: swap(d, DIMS, struct.pack("<IQQ", 2, 48, 2)), HeaderFault.SIZE_MISMATCH, "blocks of 32"),
    "a type that is not read": (
        lambda d: swap(d, DIMS + struct.pack("<I", 2), DIMS + struct.pack("<I", 10)),
        HeaderFault.UNKNOWN_DTYPE,
        "unsupported type Q2_K; supported are F32",
    ),
    "offset": (
        lambda d: swap(d, DIMS + struct.pack("<IQ", 2, 0), DIMS + struct.pack("<IQ", 2, 7)),
        HeaderFault.OUT_OF_RANGE,
        "not a multiple of the alignment",
    ),
    "far offset": (
        lambda d: swap(d, DIMS + struct.pack("<IQ", 2, 0), DIMS + struct.pack("<IQ", 2, 1 << 62)),
        HeaderFault.TRUNCATED,
        "ends at byte",
    ),
    "overlap": (
        lambda d: swap(d, DIMS + struct.pack("<IQ", 2, 0), DIMS + struct.pack("<IQ", 2, 64)),
        HeaderFault.OVERLAP,
        "before .* ends",
    ),
    "no architecture": (
        lambda d: swap(d, b"general.architecture", b"general.architectuRE"),
        HeaderFault.BAD_ENTRY,
        "general.architecture is missing",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_give_one_error(tmp_path, case):
    spoil, fault, message = HOSTILE[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(spoil(good(path)))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert caught.value.faults == (fault,)


@settings(deadline=None, max_examples=200)
@given(at=st.integers(0, 400), value=st.integers(0, 255), partition=st.integers(0, 700))
def test_any_damage_is_an_error_or_a_header_that_fits_the_file(tmp_path_factory, at, value, partition):
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    data = bytearray(good(path))
    data[at % len(data)] = value
    path.write_bytes(bytes(data[: len(data) - partition]))
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError:
        return
    size = path.stat().st_size
    assert all(info.offset + info.nbytes <= size for info in checkpoint.tensors.values())
