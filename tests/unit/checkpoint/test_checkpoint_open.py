"""Folders, indexes and the local Hugging Face cache."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from checkpoint_files import entry, safetensors_bytes, write_config, write_index, write_shard
from huggingface_hub import constants, save_torch_state_dict

from distquant.checkpoint import Checkpoint, CheckpointError, HeaderFault, open_checkpoint
from distquant.errors import InputError

CALLS = 30
"""Calls of functions that a tensor may take to be opened."""

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fault_of(folder: Any, **kwargs: Any) -> tuple[list[HeaderFault], str]:
    """The faults and the message of a checkpoint that must not open."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, **kwargs)
    return list(caught.value.faults), str(caught.value)


def sharded(folder: Path) -> Path:
    """a and b in one shard, c in another, with index and config."""
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(folder / "s1.safetensors", a=[2, 3], b=[4])
    write_shard(folder / "s2.safetensors", c=[5])
    write_index(folder, {"a": "s1.safetensors", "b": "s1.safetensors", "c": "s2.safetensors"})
    write_config(folder)
    return folder


def test_single_file(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "model.safetensors", a=[2, 3], b=[4])
    write_config(tmp_path)
    found = open_checkpoint(str(tmp_path))
    assert found == open_checkpoint(tmp_path)
    assert (found.path, found.config["hidden_size"], found.total_bytes) == (tmp_path, 8, 10)
    assert [(t.name, t.shape, t.file) for t in found.tensors.values()] == [
        ("a", (2, 3), "model.safetensors"),
        ("b", (4,), "model.safetensors"),
    ]
    data = path.read_bytes()
    assert found.tensors["b"].offset == len(data) - 4
    assert (found.folder / "model.safetensors") == path
    assert found.digests() == {"model.safetensors": (hashlib.sha256(data[:-10]).hexdigest(), len(data))}
    assert pickle.loads(pickle.dumps(found)) == found


def test_shards_of_save_torch_state_dict(tmp_path: Path) -> None:
    state = {f"layers.{i}.weight": torch.full((8, 8), i, dtype=torch.float32) for i in range(6)}
    save_torch_state_dict(state, tmp_path, max_shard_size=600)
    write_config(tmp_path)
    found = open_checkpoint(tmp_path)
    assert len(found.shards) == 3
    assert found.tensors.keys() == state.keys()
    assert found.total_bytes == 6 * 256
    for name, tensor in found.tensors.items():
        with open(found.folder / tensor.file, "rb") as file:
            file.seek(tensor.offset)
            read = torch.frombuffer(bytearray(file.read(tensor.nbytes)), dtype=torch.float32)
        assert torch.equal(read.view(tensor.shape), state[name])


def test_the_single_file_wins_over_an_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    write_shard(tmp_path / "model.safetensors", z=[1])
    assert list(open_checkpoint(tmp_path).tensors) == ["z"]


def test_shards_may_lie_in_subfolders(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "sub").mkdir()
    os.rename(tmp_path / "s2.safetensors", tmp_path / "sub" / "s2.safetensors")
    write_index(tmp_path, {"a": "s1.safetensors", "b": "s1.safetensors", "c": "sub/s2.safetensors"})
    found = open_checkpoint(tmp_path)
    assert (found.folder / found.tensors["c"].file).is_file()


def test_a_digest_follows_the_header_and_the_size(tmp_path: Path) -> None:
    before = open_checkpoint(sharded(tmp_path)).digests()
    write_shard(tmp_path / "s2.safetensors", c=[6])
    after = open_checkpoint(tmp_path).digests()
    assert before["s1.safetensors"] == after["s1.safetensors"]
    assert before["s2.safetensors"][0] != after["s2.safetensors"][0]
    assert before["s2.safetensors"][1] + 1 == after["s2.safetensors"][1]


ESCAPES = ["../x.safetensors", "/etc/x", "a/../../x", "..\\x", "C:\\x", "c:x", "a//x", "./x", "", "x\0", "a/.."]


@pytest.mark.parametrize("file", ESCAPES)
def test_a_name_that_leaves_the_folder(file: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "x.safetensors", a=[1])
    folder = sharded(tmp_path / "model")
    write_index(folder, {"a": "s1.safetensors", "b": "s1.safetensors", "c": file})
    faults, message = fault_of(folder)
    assert faults == [HeaderFault.PATH_ESCAPES]
    assert "index.json: tensor 'c'" in message and repr(file) in message


@pytest.mark.parametrize(
    ("text", "fault", "shows"),
    [
        ("", HeaderFault.INDEX_NOT_JSON, "is not JSON"),
        ("\udcff", HeaderFault.INDEX_NOT_JSON, "utf-8"),
        ('{"weight_map": ', HeaderFault.INDEX_NOT_JSON, "is not JSON"),
        ("[3]", HeaderFault.INDEX_BAD_ENTRY, "weight_map is [3]"),
        ('{"metadata": {}}', HeaderFault.INDEX_BAD_ENTRY, "weight_map is None"),
        ('{"weight_map": {}}', HeaderFault.INDEX_BAD_ENTRY, "weight_map is {}"),
        ('{"weight_map": {"a": 5}}', HeaderFault.INDEX_BAD_ENTRY, "'a': file is 5"),
    ],
)
def test_bad_index(text: str, fault: HeaderFault, shows: str, tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode(errors="surrogateescape"))
    faults, message = fault_of(tmp_path)
    assert faults == [fault]
    assert message.startswith("model.safetensors.index.json: ") and shows in message


def test_a_tensor_listed_twice(tmp_path: Path) -> None:
    sharded(tmp_path)
    listed = '{"a": "s2.safetensors", "a": "s1.safetensors", "b": "s1.safetensors", "c": "s2.safetensors"}'
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {listed}}}')
    faults, message = fault_of(tmp_path)
    assert faults == [HeaderFault.DUPLICATE_KEY]
    assert "key 'a' stands twice" in message


def test_missing_shard_is_reported_once(tmp_path: Path) -> None:
    os.remove(sharded(tmp_path) / "s1.safetensors")
    faults, message = fault_of(tmp_path)
    assert faults == [HeaderFault.SHARD_MISSING]
    assert message.startswith("s1.safetensors: is missing in") and "copy it again" in message


def test_shard_name_too_long_for_the_system(tmp_path: Path) -> None:
    sharded(tmp_path)
    write_index(tmp_path, {"a": "s1.safetensors", "b": "s1.safetensors", "c": "x" * 5000})
    faults, message = fault_of(tmp_path)
    assert len(message) < 1000
    # s2 is named by nothing, so it is not read, and its tensor is not "unlisted"
    assert faults == [HeaderFault.SHARD_MISSING]


def test_a_tensor_in_another_file_than_the_index_says(tmp_path: Path) -> None:
    write_index(sharded(tmp_path), {"a": "s1.safetensors", "b": "s2.safetensors", "c": "s2.safetensors"})
    found = open_checkpoint(tmp_path)
    assert found.tensors["b"].file == "s1.safetensors" and list(found.tensors) == ["a", "b", "c"]
    assert found.notes == (
        "read from another file than model.safetensors.index.json lists: 1 tensor (b in s1.safetensors)",
    )


def test_a_tensor_in_two_other_files_than_the_index_says(tmp_path: Path) -> None:
    """Nothing says which copy counts."""
    write_shard(sharded(tmp_path) / "s2.safetensors", c=[5], a=[2, 3])
    write_shard(tmp_path / "s3.safetensors", d=[1])
    write_index(tmp_path, {"a": "s3.safetensors", "b": "s1.safetensors", "c": "s2.safetensors", "d": "s3.safetensors"})
    faults, message = fault_of(tmp_path)
    assert faults == [HeaderFault.TENSOR_IN_TWO_SHARDS]
    assert "tensor 'a': is stored in ['s1.safetensors', 's2.safetensors'], and" in message
    assert "lists it in s3.safetensors" in message and "damaged" not in message


def test_tensor_in_no_shard(tmp_path: Path) -> None:
    """It may be one that the model does not need, so it is no fault yet."""
    write_index(sharded(tmp_path), dict.fromkeys("abd", "s1.safetensors") | {"c": "s2.safetensors"})
    found = open_checkpoint(tmp_path)
    assert list(found.tensors) == ["a", "b", "c"] and list(found.absent) == ["d"]
    assert found.absent["d"].fault is HeaderFault.TENSOR_NOT_IN_SHARD
    assert str(found.absent["d"]).startswith("s1.safetensors: tensor 'd': is in no file, though")


def test_a_missing_shard_that_the_model_may_not_need(tmp_path: Path) -> None:
    os.remove(sharded(tmp_path) / "s2.safetensors")
    found = open_checkpoint(tmp_path, incomplete=True)
    assert list(found.tensors) == ["a", "b"] and list(found.absent) == ["c"]
    assert found.absent["c"].fault is HeaderFault.SHARD_MISSING


def test_a_missing_shard_is_told_with_other_faults(tmp_path: Path) -> None:
    os.remove(sharded(tmp_path) / "s2.safetensors")
    (tmp_path / "s1.safetensors").write_bytes(b"abc")
    faults, _ = fault_of(tmp_path, incomplete=True)
    assert faults == [HeaderFault.TOO_SHORT, HeaderFault.SHARD_MISSING]


def test_a_tensor_not_in_the_index_is_ignored(tmp_path: Path) -> None:
    write_index(sharded(tmp_path), {"a": "s1.safetensors", "c": "s2.safetensors"})
    found = open_checkpoint(tmp_path)
    assert list(found.tensors) == ["a", "c"] and found.unlisted == {"b": "s1.safetensors"}
    assert found.notes == ("ignored: 1 tensor that model.safetensors.index.json does not list (b in s1.safetensors)",)


def test_of_two_copies_the_listed_one_counts(tmp_path: Path) -> None:
    write_shard(sharded(tmp_path) / "s2.safetensors", c=[5], a=[2, 3])
    found = open_checkpoint(tmp_path)
    assert found.tensors["a"].file == "s1.safetensors"
    assert "stored twice: 1 tensor; the copy that" in found.notes[0]
    write_index(tmp_path, {"a": "s2.safetensors", "b": "s1.safetensors", "c": "s2.safetensors"})
    assert open_checkpoint(tmp_path).tensors["a"].file == "s2.safetensors"


def test_a_single_file_that_hides_an_index(tmp_path: Path) -> None:
    write_shard(sharded(tmp_path) / "model.safetensors", here=[1])
    found = open_checkpoint(tmp_path)
    assert list(found.tensors) == ["here"] and found.hidden == {"a", "b", "c"}
    assert "not read: model.safetensors.index.json" in found.notes[0]


def shards(folder: Path, count: int, *parts: int, base: str = "model") -> Path:
    write_config(folder)
    for part in parts:
        write_shard(folder / f"{base}-{part:05d}-of-{count:05d}.safetensors", **{f"t{part}": [1]})
    return folder


def test_shards_without_an_index(tmp_path: Path) -> None:
    found = open_checkpoint(shards(tmp_path, 2, 1, 2))
    assert list(found.tensors) == ["t1", "t2"]
    assert (
        found.notes == found.read_otherwise == ("read without an index: 2 shards, which are complete by their names",)
    )


def test_some_shards_without_an_index(tmp_path: Path) -> None:
    faults, message = fault_of(shards(tmp_path, 4, 1, 3))
    assert faults == [HeaderFault.NO_CHECKPOINT]
    assert "holds 2 of 4 shards and no model.safetensors.index.json; missing: 00002, 00004" in message


def test_shards_of_two_checkpoints_without_an_index(tmp_path: Path) -> None:
    shards(tmp_path, 2, 1, 2)
    faults, message = fault_of(shards(tmp_path, 3, 1, 2, 3))
    assert faults == [HeaderFault.NO_CHECKPOINT] and "holds neither" in message


def test_a_tensor_in_two_shards_without_an_index(tmp_path: Path) -> None:
    write_shard(shards(tmp_path, 2, 1, 2) / "model-00002-of-00002.safetensors", t1=[1])
    faults, message = fault_of(tmp_path)
    assert faults == [HeaderFault.TENSOR_IN_TWO_SHARDS] and "and there is no model.safetensors.index.json" in message


def test_problems_of_all_files_are_reported_together(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "s1.safetensors").write_bytes(b"abc")
    (tmp_path / "s2.safetensors").write_bytes(safetensors_bytes({"c": entry("U8", [5], 0, 5)}, bytes(4)))
    faults, message = fault_of(tmp_path)
    assert faults == [HeaderFault.CONFIG_NOT_JSON, HeaderFault.TOO_SHORT, HeaderFault.TRUNCATED]
    assert [line.split(":")[0].strip() for line in message.splitlines()[1:]] == [
        "1. config.json",
        "2. s1.safetensors",
        "3. s2.safetensors",
    ]


@pytest.mark.parametrize(
    ("text", "fault", "shows"),
    [
        (None, HeaderFault.CONFIG_MISSING, "is missing in"),
        ("{", HeaderFault.CONFIG_NOT_JSON, "is not JSON"),
        ("[1]", HeaderFault.CONFIG_NOT_JSON, "is [1]"),
        ("[" * 100_000, HeaderFault.CONFIG_NOT_JSON, "is not JSON"),
    ],
)
def test_bad_config(text: str | None, fault: HeaderFault, shows: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", a=[1])
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    faults, message = fault_of(tmp_path)
    assert faults == [fault]
    assert message.startswith("config.json: ") and shows in message


@pytest.mark.parametrize(
    ("files", "shows"),
    [
        ([], "an empty folder"),
        (["pytorch_model.bin"], "save_pretrained"),
        (["llama-q4.gguf"], "Give the path of the .gguf file itself"),
        (["adapter_model.safetensors", "adapter_config.json"], "PEFT adapter"),
        (["model.fp16.safetensors"], "If model.fp16.safetensors holds the whole model, rename it to model.safetensors"),
        (["gptq_model-4bit-128g.safetensors"], "If gptq_model-4bit-128g.safetensors holds the whole model, rename"),
        (["consolidated.safetensors", "params.json"], "This is Mistral's own format"),
        (["consolidated-00001-of-00001.safetensors", "consolidated.safetensors.index.json"], "Mistral's own format"),
        (["consolidated.00.pth"], "This is Meta's own format"),
        (["pytorch_model.bin.index.json"], "Pickled weights are not read"),
    ],
)
def test_no_checkpoint(files: list[str], shows: str, tmp_path: Path) -> None:
    write_config(tmp_path)
    for file in files:
        (tmp_path / file).touch()
    if not files:
        os.remove(tmp_path / "config.json")
    faults, message = fault_of(tmp_path)
    assert HeaderFault.NO_CHECKPOINT in faults
    assert "holds neither model.safetensors nor model.safetensors.index.json" in message and shows in message


def test_a_file_instead_of_its_folder(tmp_path: Path) -> None:
    faults, message = fault_of(write_shard(tmp_path / "model.safetensors", a=[1]))
    assert faults == [HeaderFault.NO_CHECKPOINT]
    assert "is a file" in message


@pytest.mark.parametrize(
    "model", ["/no/such/folder", "./here", "missing/", "a/b/c", "org/..", "~nobody/x", "", "x" * 5000 + "/", "é/m"]
)
def test_neither_folder_nor_id(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    faults, message = fault_of(model)
    assert faults == [HeaderFault.NO_CHECKPOINT]
    assert "not a Hugging Face id" in message


def test_a_revision_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'v2' was given for the folder"):
        open_checkpoint(sharded(tmp_path), revision="v2")


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`org/name` as `hf download` lays it down: links in a snapshot to blobs named by digest. Returns the repo."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for file in sorted(sharded(tmp_path / "source").iterdir()):
        blob = repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.move(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return repo


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_cached_model(revision: str | None, cached: Path) -> None:
    found = open_checkpoint("org/name", revision=revision)
    assert found.path == cached / "snapshots" / COMMIT
    assert list(found.tensors) == ["a", "b", "c"]
    assert (found.folder / "s1.safetensors").is_symlink()


def test_cached_pull_request(cached: Path) -> None:
    (cached / "refs" / "refs" / "pr").mkdir(parents=True)
    (cached / "refs" / "refs" / "pr" / "1").write_text(COMMIT)
    assert open_checkpoint("org/name", revision="refs/pr/1").total_bytes == 15


def test_a_folder_wins_over_the_cache(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_shard(sharded(tmp_path / "org" / "name") / "model.safetensors", here=[1])
    assert list(open_checkpoint("org/name").tensors) == ["here"]


@pytest.mark.parametrize(
    ("model", "revision", "download"),
    [
        ("org/other", None, "`hf download org/other`"),
        ("gpt2", None, "`hf download gpt2`"),
        ("org/name", "v2", "`hf download org/name --revision v2`"),
    ],
)
def test_not_in_cache(model: str, revision: str | None, download: str, cached: Path) -> None:
    faults, message = fault_of(model, revision=revision)
    assert faults == [HeaderFault.NOT_IN_CACHE]
    assert message.startswith(f"{model}: ") and str(cached.parent) in message and download in message


@pytest.mark.parametrize("revision", ["../../../etc", "/etc", "", "a\\b"])
def test_revision_that_leaves_the_cache(revision: str, cached: Path) -> None:
    with pytest.raises(InputError, match="is not a branch, tag or commit"):
        open_checkpoint("org/name", revision=revision)


def test_ref_that_leaves_the_cache(cached: Path) -> None:
    (cached / "refs" / "main").write_text("../../..")
    assert fault_of("org/name")[0] == [HeaderFault.NOT_IN_CACHE]


def test_partly_downloaded_model(cached: Path) -> None:
    """A link without its blob, and a shard that was never downloaded: both are reported, with the command for them."""
    snapshot = cached / "snapshots" / COMMIT
    (snapshot / "s1.safetensors").resolve().unlink()
    (snapshot / "s2.safetensors").unlink()
    faults, message = fault_of("org/name")
    assert faults == [HeaderFault.SHARD_MISSING] * 2
    assert "a link to ../../blobs/" in message and message.count("`hf download org/name`") == 2


def test_names_in_a_cached_index_are_still_checked(cached: Path) -> None:
    snapshot = cached / "snapshots" / COMMIT
    (snapshot / "model.safetensors.index.json").unlink()
    write_index(snapshot, {"a": "../../blobs/x"})
    assert fault_of("org/name")[0] == [HeaderFault.PATH_ESCAPES]


def mixture(folder: Path, files: int, tensors: int) -> int:
    """Writes a checkpoint of sparse files; returns the bytes of its headers, index and config."""
    folder.mkdir()
    weight_map, names = (
        {},
        [f"model.layers.{i // 1500}.mlp.experts.{i % 1500}.down_proj.weight" for i in range(tensors)],
    )
    needed = 0
    for shard in range(files):
        file = f"model-{shard + 1:05}-of-{files:05}.safetensors"
        mine = names[shard::files]
        header = {name: entry("F8_E4M3", [64, 32], 2048 * i, 2048 * (i + 1)) for i, name in enumerate(mine)}
        raw = safetensors_bytes(header)
        needed += len(raw)
        (folder / file).write_bytes(raw)
        os.truncate(folder / file, len(raw) + 2048 * len(mine))
        weight_map |= dict.fromkeys(mine, file)
    write_index(folder, weight_map)
    write_config(folder)
    return needed + sum((folder / name).stat().st_size for name in ("config.json", "model.safetensors.index.json"))


def bytes_read() -> int:
    """All that this process has read."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def work_of_opening(folder: Path) -> tuple[Checkpoint, Counter[str], int]:
    """The checkpoint, how often each function was called, and the bytes that were read."""
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            calls[frame.f_code.co_name] += 1
        elif event == "c_call":
            calls[argument.__name__] += 1

    before = bytes_read()
    sys.setprofile(count)
    try:
        found = open_checkpoint(folder)
    finally:
        sys.setprofile(None)
    return found, calls, bytes_read() - before


def test_a_mixture_of_experts_is_opened_by_reading_each_header_once(tmp_path: Path) -> None:
    """163 files and 90,427 tensors, as DeepSeek-V3 has; and the work grows as they do."""
    needed = mixture(tmp_path / "large", 163, 90_427)
    found, calls, read = work_of_opening(tmp_path / "large")
    assert len(found.tensors) == 90_427 and found.total_bytes == 90_427 * 2048
    assert {tensor.file for tensor in found.tensors.values()} == set(found.digests())
    assert calls["parse_file"] == calls["_parse_json"] == 163
    assert calls["read_index"] == 1
    assert needed <= read < needed + 10_000
    assert calls.total() < CALLS * 90_427
    mixture(tmp_path / "small", 163, 9_043)
    _, fewer, _ = work_of_opening(tmp_path / "small")
    assert calls.total() < 10.5 * fewer.total()


@pytest.mark.parametrize(
    "reference", [b"", b" \n", b"\xff\xfe", b"../../../etc", b"/etc", b"a\0b", b"\x1b[2J", b"a" * 4000]
)
def test_a_reference_of_the_cache_that_names_nothing(reference: bytes, tmp_path: Path) -> None:
    refs = tmp_path / "models--org--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_bytes(reference)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("org/name", cache_dir=tmp_path)
    assert caught.value.faults == (HeaderFault.NOT_IN_CACHE,)
