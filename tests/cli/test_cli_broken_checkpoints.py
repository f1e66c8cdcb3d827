"""Every kind of broken checkpoint, seen by `plan` and by `load`: one message, exit code 2, nothing written."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runs import Command, tells

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
DAMAGED = "download or copy it again"


def edit_header(path: Path, edit: Callable[[dict], object]) -> None:
    """Rewrites a file's header, keeping its data."""
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    edited = edit(header)
    raw = edited if isinstance(edited, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + whole[end:])


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    document = json.loads((folder / INDEX).read_text())
    edit(document["weight_map"])
    (folder / INDEX).write_text(json.dumps(document))


def header_longer_than_the_file(folder: Path) -> None:
    whole = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes((10_000_000).to_bytes(8, "little") + whole[8:])


def header_over_the_cap(folder: Path) -> None:
    whole = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes((1 << 62).to_bytes(8, "little") + whole[8:])


def header_not_json(folder: Path) -> None:
    edit_header(folder / FIRST, lambda header: b'{"a": nonsense}')


def header_with_a_key_twice(folder: Path) -> None:
    entry = '{"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
    raw = f'{{"model.norm.weight": {entry}, "model.norm.weight": {entry}}}'.encode()
    (folder / FIRST).write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0")
    edit_index(folder, lambda weights: (weights.clear(), weights.update({"model.norm.weight": FIRST})))


def overlapping_tensors(folder: Path) -> None:
    def edit(header: dict) -> None:
        """The second tensor gets one more row, and so begins within the first."""
        found = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
        entry = header[found[1]]
        entry["data_offsets"][0] -= 2 * math.prod(entry["shape"][1:])
        entry["shape"][0] += 1

    edit_header(folder / FIRST, edit)


def offsets_that_do_not_fit_the_shape(folder: Path) -> None:
    def edit(header: dict) -> None:
        header["model.embed_tokens.weight"]["shape"][0] -= 1

    edit_header(folder / FIRST, edit)


def unknown_dtype(folder: Path) -> None:
    edit_header(folder / FIRST, lambda header: header["model.embed_tokens.weight"].update(dtype="BF17"))


def truncated_shard(folder: Path) -> None:
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 5)


def shard_with_bytes_too_many(folder: Path) -> None:
    with open(folder / SECOND, "ab") as file:
        file.write(b"12345")


def missing_shard(folder: Path) -> None:
    (folder / SECOND).unlink()


def weight_map_leaves_the_folder(folder: Path) -> None:
    edit_index(folder, lambda weights: weights.update({"model.ghost.weight": "../../etc/passwd"}))


def index_not_json(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {')


def config_missing(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (header_longer_than_the_file, rf"^{FIRST}: header of 10000000 bytes in a file of \d+ bytes\. .*{DAMAGED}"),
    (header_over_the_cap, rf"^{FIRST}: header of 4611686018427387904 bytes, over the cap of 100000000 .*{DAMAGED}"),
    (header_not_json, rf"^{FIRST}: header is not JSON .*{DAMAGED}"),
    (header_with_a_key_twice, rf"^{FIRST}: key 'model.norm.weight' stands twice .*{DAMAGED}"),
    (overlapping_tensors, rf"^{FIRST}: tensor '[\w.]+': starts at byte \d+, before '[\w.]+' ends at \d+\. .*{DAMAGED}"),
    (
        offsets_that_do_not_fit_the_shape,
        rf"^{FIRST}: tensor 'model.embed_tokens.weight': shape \[2047, 128\] of BF16 takes 524032 bytes, "
        rf"and data_offsets span 524288\. .*{DAMAGED}",
    ),
    (
        unknown_dtype,
        rf"^{FIRST}: tensor 'model.embed_tokens.weight': unknown dtype 'BF17'; known are .*Use a newer distquant",
    ),
    (
        truncated_shard,
        rf"^{SECOND}: tensor '[\w.]+': ends at byte \d+, .* only \d+ bytes long\. .*{DAMAGED}",
    ),
    (shard_with_bytes_too_many, rf"^{SECOND}: file is \d+ bytes long, and its last tensor ends at \d+\. .*{DAMAGED}"),
    (missing_shard, rf"^{SECOND}: is missing in /.*\. .*{DAMAGED}"),
    (
        weight_map_leaves_the_folder,
        rf"^{INDEX}: tensor 'model.ghost.weight': file is '../../etc/passwd', not a plain path below "
        rf"the checkpoint's folder\. Do not trust this checkpoint",
    ),
    (index_not_json, rf"^{INDEX}: is not JSON .*{DAMAGED}"),
    (config_missing, r"^config\.json: is missing in /.*\. Put the model's config\.json there"),
    (config_not_json, rf"^config\.json: is not JSON .*{DAMAGED}"),
]


@pytest.fixture
def spoiled(kjv_tiny: str, tmp_path: Path) -> Path:
    """A copy of the trained example (three shards and an index) for a test to break."""
    return Path(shutil.copytree(kjv_tiny, tmp_path / "spoiled"))


@pytest.mark.parametrize("name", ["plan", "load", "inspect"])
@pytest.mark.parametrize(("spoil", "pattern"), [pytest.param(*case, id=case[0].__name__) for case in BROKEN])
def test_broken_checkpoint(
    spoil: Callable[[Path], object], pattern: str, name: str, spoiled: Path, refused: Command
) -> None:
    spoil(spoiled)
    before = {path.name: path.read_bytes() for path in spoiled.iterdir()}
    tells(refused(name, spoiled), pattern)
    assert {path.name: path.read_bytes() for path in spoiled.iterdir()} == before


def test_problems_of_several_files_are_reported_together(spoiled: Path, refused: Command) -> None:
    truncated_shard(spoiled)
    header_not_json(spoiled)
    config_not_json(spoiled)
    done = refused("load", spoiled)
    assert done.code == 2
    assert [problem.split(":")[0] for problem in done.problems] == ["config.json", FIRST, SECOND]


@pytest.mark.parametrize("name", ["plan", "load", "inspect"])
class TestPathThatIsNoCheckpoint:
    """Each kind of path that holds nothing to load."""

    def test_empty_folder(self, name: str, tmp_path: Path, refused: Command) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "config.json").write_text("{}")
        pattern = r"empty: holds neither model\.safetensors nor .*index\.json; found: .*\. Give the folder that "
        tells(refused(name, tmp_path / "empty"), pattern)

    def test_folder_of_pickled_weights(self, name: str, tmp_path: Path, refused: Command) -> None:
        folder = tmp_path / "pickled"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "pytorch_model.bin").write_bytes(b"")
        pattern = r"pickled: .*found: .*'pytorch_model\.bin'.*\. Pickled weights are not read: .*save_pretrained\(\)"
        tells(refused(name, folder), pattern)

    def test_file(self, name: str, kjv_tiny: str, refused: Command) -> None:
        pattern = r"config\.json: is a file, not a folder\. Give the folder"
        tells(refused(name, f"{kjv_tiny}/config.json"), pattern)

    def test_path_that_does_not_exist(self, name: str, tmp_path: Path, refused: Command) -> None:
        pattern = r"nowhere: no folder has this path, and it is not a Hugging Face id\. Give an existing folder"
        tells(refused(name, tmp_path / "nowhere"), pattern)

    def test_id_that_is_not_in_the_cache(self, name: str, refused: Command) -> None:
        pattern = r"^nobody/nothing: revision 'main' is not in the Hugging Face cache .*`hf download nobody/nothing`"
        tells(refused(name, "nobody/nothing"), pattern)


def test_generation_config_that_is_no_json(tmp_path: Path, kjv_tiny: str, refused: Command) -> None:
    """Told before weights are read, and not taken for a checkpoint that has none."""
    model = tmp_path / "broken"
    shutil.copytree(kjv_tiny, model)
    (model / "generation_config.json").write_text("{")
    tells(refused("plan", model), r"broken: .*generation_config\.json")
