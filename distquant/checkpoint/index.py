"""`model.safetensors.index.json`: the map of tensors to shards, compared with the shards' own headers.

Written by `save_pretrained`: `{"metadata": {...}, "weight_map": {tensor: file}}`. `metadata.total_size` is ignored,
because published checkpoints often have it wrong and nothing here needs it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from distquant.checkpoint.faults import Faults, HeaderFault, shown
from distquant.checkpoint.headers import ShardHeader, TensorInfo, load_json
from distquant.files import INDEX_BYTES, read_file

INDEX_NAME = "model.safetensors.index.json"


def read_index(folder: Path, faults: Faults) -> dict[str, str]:
    """Reads the weight map, tensor name -> file name; a file name outside the folder is a fault and left out."""
    try:
        document = load_json(read_file(folder / INDEX_NAME, INDEX_BYTES).decode(), INDEX_NAME, faults)
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error})"
        faults.add(HeaderFault.UNREADABLE, INDEX_NAME, reason, fix="Put the model's index there, readable")
        return {}
    except ValueError as error:  # JSON's and UTF-8's errors are both ValueErrors
        faults.add(HeaderFault.INDEX_NOT_JSON, INDEX_NAME, f"is not JSON ({error})")
        return {}
    listed = document.get("weight_map") if isinstance(document, dict) else document
    if not isinstance(listed, dict) or not listed:
        reason = f"weight_map is {shown(listed)}, not a map of tensor names to file names"
        faults.add(HeaderFault.INDEX_BAD_ENTRY, INDEX_NAME, reason)
        return {}
    weight_map = {}
    inside: dict[str, bool] = {}  # few files hold many tensors
    for tensor, file in listed.items():
        if not isinstance(file, str):
            reason = f"file is {shown(file)}, not a file name"
            faults.add(HeaderFault.INDEX_BAD_ENTRY, INDEX_NAME, reason, tensor=tensor)
            continue
        if file not in inside:
            inside[file] = is_inside(file)
        if inside[file]:
            weight_map[tensor] = file
        else:
            reason = f"file is {shown(file)}, not a plain path below the checkpoint's folder"
            fix = "Do not trust this checkpoint; get it from its publisher"
            faults.add(HeaderFault.PATH_ESCAPES, INDEX_NAME, reason, tensor=tensor, fix=fix)
    return weight_map


def is_inside(file: str) -> bool:
    """Returns True if the *name* stays below its folder on every system.

    Links are not followed: the Hugging Face cache is made of links to `../../blobs`.
    """
    if "\\" in file or "\0" in file or re.match(r"[A-Za-z]:", file):
        return False
    return not any(part in ("", ".", "..") for part in file.split("/"))


def merge(
    weight_map: dict[str, str], shards: Iterable[ShardHeader], unreadable: set[str], faults: Faults
) -> dict[str, TensorInfo]:
    """Returns all tensors of all shards, after comparing the shards with the index.

    Args:
        weight_map: tensor name -> file name, from the index.
        shards: headers of the files that could be read.
        unreadable: names of files whose faults are already in `faults`; their tensors are not reported as missing.
        faults: collects every difference.
    """
    tensors: dict[str, TensorInfo] = {}
    files_of: dict[str, list[str]] = {}  # only of tensors that are stored in several files
    for shard in shards:
        for tensor in shard.tensors:
            first = tensors.setdefault(tensor.name, tensor)
            if first is not tensor:
                files_of.setdefault(tensor.name, [first.file]).append(tensor.file)
    for name, files in files_of.items():
        reason = f"is stored in {len(files)} files, {shown(files)}, not in one"
        faults.add(HeaderFault.TENSOR_IN_TWO_SHARDS, files[1], reason, tensor=name)
    for name, tensor in tensors.items():
        if name not in weight_map:
            reason = f"is not listed by {INDEX_NAME}"
            fix = f"{faults.damaged}, {INDEX_NAME} too: the two are of different versions"
            faults.add(HeaderFault.TENSOR_NOT_IN_INDEX, tensor.file, reason, tensor=name, fix=fix)
    for name, file in weight_map.items():
        stored = tensors.get(name)
        files = files_of.get(name) or ([stored.file] if stored else [])
        if file not in files and file not in unreadable:
            elsewhere = f", but in {shown(files)}" if files else ""
            reason = f"is not in this file, where {INDEX_NAME} places it{elsewhere}"
            faults.add(HeaderFault.TENSOR_NOT_IN_SHARD, file, reason, tensor=name)
    return tensors
