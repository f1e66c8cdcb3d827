"""A checkpoint folder: its config and every tensor's place, read from headers alone and checked together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from distquant.checkpoint.faults import NAME_SHOWN, Fault, Faults, HeaderFault, shown
from distquant.checkpoint.folders import ADAPTER_CONFIG, SINGLE_NAME, shards_without_index
from distquant.checkpoint.gguf import SUFFIX
from distquant.checkpoint.gguf_parts import open_parts
from distquant.checkpoint.headers import ShardHeader, TensorInfo, parse_file
from distquant.checkpoint.index import INDEX_NAME, Merged, merge, read_index
from distquant.checkpoint.locate import locate
from distquant.checkpoint.sidecar_configs import add_sidecar, read_config
from distquant.dtypes import STORED_FLOATS
from distquant.stamps import Stamp


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that passed every check its headers allow.

    Attributes:
        path: the folder, or the one GGUF file (the first one of a split model).
        config: the parsed config.json. For a GGUF file it only names the method and the file.
        tensors: headers of all tensors by name, in the order of files and offsets.
        shards: headers of all files, in the order of their names.
        types: GGML type of each tensor of a GGUF file; empty for safetensors.
        architecture: `general.architecture` of a GGUF file.
        numbers: whole numbers among the values of a GGUF file, by key.
        notes: what is odd about its files, though nothing is wrong.
        read_otherwise: those of the notes about what transformers itself would read in another way.
        absent: tensor that the index lists and no file has -> the fault, for a model that needs it.
        unlisted: tensor that a file has and the index does not list -> the file.
        hidden: tensors that the index lists, where `model.safetensors` beside it takes precedence.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    shards: tuple[ShardHeader, ...]
    types: dict[str, str] = field(default_factory=dict)
    architecture: str = ""
    notes: tuple[str, ...] = ()
    read_otherwise: tuple[str, ...] = ()
    absent: Mapping[str, Fault] = field(default_factory=dict)
    unlisted: Mapping[str, str] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()
    numbers: Mapping[str, int] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder that holds its files."""
        return self.path.parent if self.types else self.path

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of all tensors, without the headers."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def dtype(self) -> str | None:
        """The dtype that transformers 5 takes for `auto` where config.json names none; None where it decides so, too.

        It is that of the first tensor of floats of 16 bits or more: by name, in the first file
        (`get_state_dict_dtype`, `modeling_utils.py`). For GGUF files it is float32, whatever they hold.
        """
        if self.types or not self.shards:
            return None
        first = sorted(self.shards[0].tensors, key=lambda tensor: tensor.name)
        return next((STORED_FLOATS[tensor.dtype] for tensor in first if tensor.dtype in STORED_FLOATS), None)

    def digests(self) -> dict[str, tuple[str, int]]:
        """File name -> (SHA-256 of its header, file size in bytes): equal on two machines if the headers are."""
        return {shard.name: (shard.digest, shard.size) for shard in self.shards}

    def stamps(self) -> dict[str, Stamp]:
        """File name -> what the system said of it when its header was read; of this machine and moment alone."""
        return {shard.name: shard.stamp for shard in self.shards}


def open_checkpoint(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    incomplete: bool = False,
) -> Checkpoint:
    """Reads a checkpoint's config.json and the headers of all its safetensors files.

    Args:
        model: a folder, a `.gguf` file, or a Hugging Face id ("org/name"), which is looked up in the local cache only.
        revision: branch, tag or commit of an id.
        cache_dir: folder in which an id is looked up; None is the Hugging Face cache.
        incomplete: True leaves it to the caller if the model needs the tensors of a missing file, see `absent`.

    As in transformers, `model.safetensors` takes precedence over an index beside it.

    Raises:
        CheckpointError: lists every problem of every file.
        InputError: the revision is invalid.
    """
    folder, damaged = locate(model, revision, cache_dir)
    faults = Faults(damaged)
    if folder.suffix == SUFFIX and not os.path.isdir(folder):
        return _open_gguf(folder, faults)
    config = read_config(folder, faults)
    hidden, otherwise, merged = frozenset[str](), list[str](), Merged()
    missing: dict[str, Fault] = {}
    if os.path.lexists(folder / SINGLE_NAME):
        shards = _read_shards(folder, [SINGLE_NAME], missing, faults)
        merged = Merged({tensor.name: tensor for shard in shards for tensor in shard.tensors})
        hidden, incomplete = _hidden(folder), False
    elif os.path.lexists(folder / INDEX_NAME):
        weight_map = read_index(folder, faults)
        shards = _read_shards(folder, sorted(set(weight_map.values())), missing, faults)
        merged = merge(weight_map, shards, missing, faults)
        otherwise += merged.notes()
    else:
        shards = _read_shards(folder, shards_without_index(folder, faults), missing, faults)
        merged = merge({tensor.name: shard.name for shard in shards for tensor in shard.tensors}, shards, {}, faults)
        otherwise += [f"read without an index: {len(shards)} shards, which are complete by their names"]
        for name, files in merged.stale.items():
            reason = f"is stored in {shown([*files, merged.tensors[name].file])}, and there is no {INDEX_NAME}"
            fix = f"Get the {INDEX_NAME} that belongs to these files"
            faults.add(HeaderFault.TENSOR_IN_TWO_SHARDS, files[0], reason, tensor=name, fix=fix)
    notes = list(otherwise)
    if hidden:
        notes.append(f"not read: {INDEX_NAME} and its shards, because {SINGLE_NAME} comes first, as in transformers")
    if os.path.lexists(folder / ADAPTER_CONFIG):
        notes.append(f"beside the model lies an adapter ({ADAPTER_CONFIG}): give --adapter FOLDER, or --no-adapter")
    sidecar = add_sidecar(folder, config, merged.tensors, faults)
    if missing and (faults or not incomplete):
        faults.take(missing.values())
    faults.raise_if_any()
    return Checkpoint(
        folder,
        config,
        merged.tensors,
        tuple(shards),
        notes=(*notes, *([sidecar] if sidecar else [])),
        read_otherwise=tuple(otherwise),
        absent=merged.absent,
        unlisted=merged.unlisted,
        hidden=hidden,
    )


def _open_gguf(path: Path, faults: Faults) -> Checkpoint:
    """Opens a GGUF file, or all files of a split model; its configuration is read when the model is built."""
    path, headers = open_parts(path, faults)
    faults.raise_if_any()
    config = {"quantization_config": {"quant_method": "gguf", "gguf_file": path.name}}
    tensors = {tensor.name: tensor for header in headers for tensor in header.shard.tensors}
    types = {name: kind for header in headers for name, kind in header.types.items()}
    shards, first = tuple(header.shard for header in headers), headers[0]
    return Checkpoint(path, config, tensors, shards, types, first.architecture, numbers=first.numbers)


def _hidden(folder: Path) -> frozenset[str]:
    """Returns the tensors of an index beside `model.safetensors`, which is not read; its faults do not matter."""
    if not os.path.lexists(folder / INDEX_NAME):
        return frozenset()
    return frozenset(read_index(folder, Faults("")))


def _read_shards(folder: Path, names: list[str], missing: dict[str, Fault], faults: Faults) -> list[ShardHeader]:
    """Reads the headers; files that are not there go to `missing`."""
    shards: list[ShardHeader] = []
    for name in names:
        path = folder / name
        if not os.path.exists(path):  # unlike Path.exists, this raises nothing for a name too long for the system
            link = f", a link to {os.readlink(path)} which does not exist" if os.path.islink(path) else ""
            reason = f"is missing in {folder}{link}"
            missing[name] = Fault(name[:NAME_SHOWN], reason, faults.damaged, HeaderFault.SHARD_MISSING, name)
            continue
        header = parse_file(path, name, faults)
        if header is not None:
            shards.append(header)
    return shards
