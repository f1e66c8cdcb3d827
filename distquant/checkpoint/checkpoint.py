"""A checkpoint folder: its config and every tensor's place, known from headers alone and checked as a whole."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from distquant.checkpoint.faults import Faults, HeaderFault, shown
from distquant.checkpoint.gguf import SUFFIX, parse_gguf
from distquant.checkpoint.headers import ShardHeader, TensorInfo, parse_file
from distquant.checkpoint.index import INDEX_NAME, merge, read_index
from distquant.checkpoint.locate import locate
from distquant.files import CONFIG_BYTES, read_file

SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
QUANTO_MAP_NAME = "quanto_qmap.json"

_OTHER_FORMATS = {
    "adapter_model.safetensors": "This is a PEFT adapter: give the base model",
    ".gguf": "Give the path of the .gguf file itself",
    ".bin": "Pickled weights are not read: load with transformers and save_pretrained() once",
    ".pt": "Pickled weights are not read: load with transformers and save_pretrained() once",
    ".pth": "Pickled weights are not read: load with transformers and save_pretrained() once",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that passed every check its headers allow.

    Attributes:
        path: its folder, or its one file (GGUF).
        config: parsed config.json; of a GGUF file that it is one.
        tensors: by name, in the order of files and offsets.
        shards: in the order of their names.
        types: GGML type of each tensor of a GGUF file.
        architecture: of a GGUF file.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    shards: tuple[ShardHeader, ...]
    types: dict[str, str] = field(default_factory=dict)
    architecture: str = ""

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return self.path.parent if self.types else self.path

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of all tensors, headers left out."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def file_path(self, name: str) -> Path:
        """Where the file `name` (a `TensorInfo.file` or `ShardHeader.name`) lies."""
        return self.folder / name

    def digests(self) -> dict[str, tuple[str, int]]:
        """File name to (SHA-256 of its header, file size in bytes); equal on two machines iff the headers are."""
        return {shard.name: (shard.digest, shard.size) for shard in self.shards}


def open_checkpoint(model: str | os.PathLike[str], *, revision: str | None = None) -> Checkpoint:
    """Reads a checkpoint's config.json and the headers of all its safetensors files.

    Args:
        model: a folder, a `.gguf` file, or a Hugging Face id ("org/name"), which is looked up in the local cache only.
        revision: branch, tag or commit of an id.

    As in transformers, `model.safetensors` wins over an index beside it.

    Raises:
        CheckpointError: with every problem of every file.
        InputError: for a revision that cannot be.
    """
    folder, damaged = locate(model, revision)
    faults = Faults(damaged)
    if folder.suffix == SUFFIX and not folder.is_dir():
        return _open_gguf(folder, faults)
    config = _read_config(folder, faults)
    if os.path.lexists(folder / QUANTO_MAP_NAME) and "quantization_config" not in config:
        config["quantization_config"] = _of_quanto_map(folder, faults)
    if os.path.lexists(folder / SINGLE_NAME):
        shards, _ = _read_shards(folder, [SINGLE_NAME], faults)
        tensors = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    elif os.path.lexists(folder / INDEX_NAME):
        weight_map = read_index(folder, faults)
        shards, unreadable = _read_shards(folder, sorted(set(weight_map.values())), faults)
        tensors = merge(weight_map, shards, unreadable, faults)
    else:
        shards, tensors = [], {}
        _tell_what_is_there(folder, faults)
    faults.raise_if_any()
    return Checkpoint(folder, config, tensors, tuple(shards))


def _open_gguf(path: Path, faults: Faults) -> Checkpoint:
    """A checkpoint that is one GGUF file; its configuration is read from it when the model is built."""
    header = parse_gguf(path, path.name, faults)
    faults.raise_if_any()
    assert header is not None
    config = {"quantization_config": {"quant_method": "gguf", "gguf_file": path.name}}
    tensors = {tensor.name: tensor for tensor in header.shard.tensors}
    return Checkpoint(path, config, tensors, (header.shard,), header.types, header.architecture)


def _read_config(folder: Path, faults: Faults, name: str = CONFIG_NAME) -> dict[str, Any]:
    try:
        config = json.loads(read_file(folder / name, CONFIG_BYTES))
    except FileNotFoundError:
        what = f"is missing in {folder}"
        faults.add(HeaderFault.CONFIG_MISSING, name, what, fix=f"Put the model's {name} there")
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})"
        faults.add(HeaderFault.UNREADABLE, name, what, fix=f"Put the model's {name} there, readable")
    except (ValueError, RecursionError) as error:
        faults.add(HeaderFault.CONFIG_NOT_JSON, name, f"is not JSON ({error})")
    else:
        if isinstance(config, dict):
            return config
        faults.add(HeaderFault.CONFIG_NOT_JSON, name, f"is {shown(config)}, and must be a JSON object")
    return {}


def _of_quanto_map(folder: Path, faults: Faults) -> dict[str, Any]:
    """optimum-quanto says beside config.json what is quantized: module -> {"weights": "qint8", "activations": "none"}.

    Written by its `QuantizedModelForCausalLM` (0.2.7, `models/transformers_models.py`). Kinds that differ from module
    to module are joined, and so refused as a value that no configuration allows.
    """
    found = _read_config(folder, faults, QUANTO_MAP_NAME)
    entries = [entry for entry in found.values() if isinstance(entry, dict)]
    if len(entries) < len(found):
        faults.add(HeaderFault.CONFIG_NOT_JSON, QUANTO_MAP_NAME, "has entries that are no JSON objects")
    weights = sorted({str(entry.get("weights")).removeprefix("q") for entry in entries})
    activations = sorted({str(entry.get("activations")).removeprefix("q") for entry in entries} - {"none", "None"})
    names = {"float8_e4m3fn": "float8"}
    return {
        "quant_method": "quanto",
        "weights": ", ".join(names.get(kind, kind) for kind in weights),
        "activations": ", ".join(names.get(kind, kind) for kind in activations) or None,
        "modules_to_not_convert": [],
        "include_modules": sorted(found),
    }


def _read_shards(folder: Path, names: list[str], faults: Faults) -> tuple[list[ShardHeader], set[str]]:
    """The headers that could be read, and the names of files whose tensors are not, or not all, known."""
    shards: list[ShardHeader] = []
    unreadable: set[str] = set()
    for name in names:
        path = folder / name
        if not os.path.exists(path):  # unlike Path.exists, no exception for a name too long for the system
            link = f", a link to {os.readlink(path)} which does not exist" if os.path.islink(path) else ""
            faults.add(HeaderFault.SHARD_MISSING, name, f"is missing in {folder}{link}")
            unreadable.add(name)
            continue
        of_file = Faults(faults.damaged)
        header = parse_file(path, name, of_file)
        if header is not None:
            shards.append(header)
        if of_file:
            unreadable.add(name)
            faults.extend(of_file)
    return shards, unreadable


def _tell_what_is_there(folder: Path, faults: Faults) -> None:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        what = f"cannot be listed ({error.strerror or error})"
        faults.add(HeaderFault.UNREADABLE, str(folder), what, fix="Check the folder's permissions")
        return
    fix = next(
        (fix for end, fix in _OTHER_FORMATS.items() if any(name.endswith(end) for name in names)),
        "Give the folder that save_pretrained() or `hf download` wrote",
    )
    there = shown(names) if names else "an empty folder"
    what = f"holds neither {SINGLE_NAME} nor {INDEX_NAME}; found: {there}"
    faults.add(HeaderFault.NO_CHECKPOINT, str(folder), what, fix=fix)
