"""Split GGUF models, as llama.cpp's gguf-split writes them: all files are read, whichever is given."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from ggufs import write_gguf

import distquant as dq


def split(whole: Path, folder: Path, counts: list[int]) -> list[Path]:
    """Divides a file into parts of so many tensors; the last takes the rest. Only the first has the model's values."""
    reader = GGUFReader(whole)
    tensors, paths = list(reader.tensors), []
    for number in range(len(counts) + 1):
        path = folder / f"small-{number + 1:05d}-of-{len(counts) + 1:05d}.gguf"
        writer = GGUFWriter(path, "llama")
        if number:
            writer.kv_data[0].clear()  # gguf-split writes no architecture there
        else:
            for field in reader.fields.values():
                if field.name.startswith(("GGUF.", "general.architecture")):
                    continue
                kind, inner = field.types[0], field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), kind, inner)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", len(counts) + 1)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        count = counts[number] if number < len(counts) else len(tensors)
        for tensor in tensors[:count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        tensors = tensors[count:]
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def whole(model_of, tmp_path_factory) -> Path:
    return write_gguf(Path(model_of("llama-gqa")), tmp_path_factory.mktemp("gguf") / "small.gguf", "Q8_0")


@pytest.mark.parametrize("counts", [[8, 8], [1], [0, 20]])
def test_all_parts_are_read(whole: Path, tmp_path: Path, counts: list[int]) -> None:
    """Also if the first one has no tensors (`--no-tensor-first-split`), or the output head is in the last."""
    expected = dq.fingerprint(dq.load(whole))
    parts = split(whole, tmp_path, counts)
    plans = [dq.plan(part) for part in parts]
    assert len({plan.digest for plan in plans}) == 1, "any part names the model"
    assert dq.fingerprint(dq.load(parts[-1])) == expected


def test_a_part_that_is_missing(whole: Path, tmp_path: Path) -> None:
    first, second, third = split(whole, tmp_path, [8, 8])
    second.unlink()
    with pytest.raises(dq.InputError, match=rf"^{second.name}: is missing in .*, beside {first.name}"):
        dq.plan(first)
    first.unlink()
    with pytest.raises(dq.InputError, match="2 problems"):
        dq.plan(third)


def test_a_name_that_does_not_say_which(whole: Path, tmp_path: Path) -> None:
    first, *_ = split(whole, tmp_path, [8, 8])
    path = first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(dq.InputError, match=r"is one of 3 files of a split model, and its name does not say which"):
        dq.plan(path)


def test_parts_in_another_order(whole: Path, tmp_path: Path) -> None:
    first, second, _ = split(whole, tmp_path, [8, 8])
    data = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(dq.InputError, match=r"says that it is file 1 of 3, not what its name says"):
        dq.plan(first)
    second.write_bytes(data)
