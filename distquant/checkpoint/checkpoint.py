"""A checkpoint folder: its config and every tensor's place, read from headers alone and checked together."""

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
        path: the folder, or the one GGUF file.
        config: the parsed config.json. For a GGUF file it only names the method and the file.
        tensors: headers of all tensors by name, in the order of files and offsets.
        shards: headers of all files, in the order of their names.
        types: GGML type of each tensor of a GGUF file; empty for safetensors.
        architecture: `general.architecture` of a GGUF file.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    shards: tuple[ShardHeader, ...]
    types: dict[str, str] = field(default_factory=dict)
    architecture: str = ""

    @property
    def folder(self) -> Path:
        """The folder that holds its files."""
        return self.path.parent if self.types else self.path

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of all tensors, without the headers."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def digests(self) -> dict[str, tuple[str, int]]:
        """File name -> (SHA-256 of its header, file size in bytes): equal on two machines if the headers are."""
        return {shard.name: (shard.digest, shard.size) for shard in self.shards}


def open_checkpoint(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Reads a checkpoint's config.json and the headers of all its safetensors files.

    Args:
        model: a folder, a `.gguf` file, or a Hugging Face id ("org/name"), which is looked up in the local cache only.
        revision: branch, tag or commit of an id.
        cache_dir: folder in which an id is looked up; None is the Hugging Face cache.

    As in transformers, `model.safetensors` takes precedence over an index beside it.

    Raises:
        CheckpointError: lists every problem of every file.
        InputError: the revision is invalid.
    """
    folder, damaged = locate(model, revision, cache_dir)
    faults = Faults(damaged)
    if folder.suffix == SUFFIX and not folder.is_dir():
        return _open_gguf(folder, faults)
    config = _read_config(folder, faults)
    if os.path.lexists(folder / QUANTO_MAP_NAME) and "quantization_config" not in config:
        config["quantization_config"] = _config_of_quanto_map(folder, faults)
    if os.path.lexists(folder / SINGLE_NAME):
        shards, _ = _read_shards(folder, [SINGLE_NAME], faults)
        tensors = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    elif os.path.lexists(folder / INDEX_NAME):
        weight_map = read_index(folder, faults)
        shards, unreadable = _read_shards(folder, sorted(set(weight_map.values())), faults)
        tensors = merge(weight_map, shards, unreadable, faults)
    else:
        shards, tensors = [], {}
        _add_no_checkpoint(folder, faults)
    faults.raise_if_any()
    return Checkpoint(folder, config, tensors, tuple(shards))


def _open_gguf(path: Path, faults: Faults) -> Checkpoint:
    """Opens a single GGUF file; its configuration is read when the model is built."""
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
        reason = f"is missing in {folder}"
        faults.add(HeaderFault.CONFIG_MISSING, name, reason, fix=f"Put the model's {name} there")
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error})"
        faults.add(HeaderFault.UNREADABLE, name, reason, fix=f"Put the model's {name} there, readable")
    except (ValueError, RecursionError) as error:
        faults.add(HeaderFault.CONFIG_NOT_JSON, name, f"is not JSON ({error})")
    else:
        if isinstance(config, dict):
            return config
        faults.add(HeaderFault.CONFIG_NOT_JSON, name, f"is {shown(config)}, not a JSON object")
    return {}


def _config_of_quanto_map(folder: Path, faults: Faults) -> dict[str, Any]:
    """Converts optimum-quanto's map of quantized modules into a `quantization_config`.

    The map is a file beside config.json: module -> {"weights": "qint8", "activations": "none"}. It is written by
    `QuantizedModelForCausalLM` (0.2.7, `models/transformers_models.py`).
    """
    entries_by_module = _read_config(folder, faults, QUANTO_MAP_NAME)
    entries = [entry for entry in entries_by_module.values() if isinstance(entry, dict)]
    if len(entries) < len(entries_by_module):
        faults.add(HeaderFault.CONFIG_NOT_JSON, QUANTO_MAP_NAME, "has entries that are not JSON objects")
    weights = sorted({str(entry.get("weights")).removeprefix("q") for entry in entries})
    activations = sorted({str(entry.get("activations")).removeprefix("q") for entry in entries} - {"none", "None"})
    names = {"float8_e4m3fn": "float8"}
    # Precisions that differ between modules are joined by commas: no configuration allows such a value, so that the
    # check of its fields rejects it and names them all.
    return {
        "quant_method": "quanto",
        "weights": ", ".join(names.get(kind, kind) for kind in weights),
        "activations": ", ".join(names.get(kind, kind) for kind in activations) or None,
        "modules_to_not_convert": [],
        "include_modules": sorted(entries_by_module),
    }


def _read_shards(folder: Path, names: list[str], faults: Faults) -> tuple[list[ShardHeader], set[str]]:
    """Reads the headers; also returns the names of the files whose tensors are not all known."""
    shards: list[ShardHeader] = []
    unreadable: set[str] = set()
    for name in names:
        path = folder / name
        if not os.path.exists(path):  # unlike Path.exists, this raises nothing for a name too long for the system
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


def _add_no_checkpoint(folder: Path, faults: Faults) -> None:
    """Adds the fault of a folder without safetensors, with advice that fits the files in it."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        reason = f"cannot be listed ({error.strerror or error})"
        faults.add(HeaderFault.UNREADABLE, str(folder), reason, fix="Check the folder's permissions")
        return
    fix = next(
        (fix for end, fix in _OTHER_FORMATS.items() if any(name.endswith(end) for name in names)),
        "Give the folder that save_pretrained() or `hf download` wrote",
    )
    there = shown(names) if names else "an empty folder"
    reason = f"holds neither {SINGLE_NAME} nor {INDEX_NAME}; found: {there}"
    faults.add(HeaderFault.NO_CHECKPOINT, str(folder), reason, fix=fix)
