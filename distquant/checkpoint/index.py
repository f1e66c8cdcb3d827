"""`model.safetensors.index.json`: which shard holds which tensor, and whether the shards agree.

Written by `save_pretrained`: `{"metadata": {...}, "weight_map": {tensor: file}}`. `metadata.total_size` is not looked
at, because published checkpoints often get it wrong and nothing here needs it.
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
    """The weight map (tensor name to file name); names that leave the folder are told and left out."""
    try:
        document = load_json(read_file(folder / INDEX_NAME, INDEX_BYTES).decode(), INDEX_NAME, faults)
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})"
        faults.add(HeaderFault.UNREADABLE, INDEX_NAME, what, fix="Put the model's index there, readable")
        return {}
    except ValueError as error:  # JSON's and UTF-8's errors are both ValueErrors
        faults.add(HeaderFault.INDEX_NOT_JSON, INDEX_NAME, f"is not JSON ({error})")
        return {}
    found = document.get("weight_map") if isinstance(document, dict) else document
    if not isinstance(found, dict) or not found:
        what = f"weight_map is {shown(found)}, and must map tensor names to file names"
        faults.add(HeaderFault.INDEX_BAD_ENTRY, INDEX_NAME, what)
        return {}
    weight_map = {}
    inside: dict[str, bool] = {}  # few files hold many tensors
    for tensor, file in found.items():
        if not isinstance(file, str):
            what = f"file is {shown(file)}, and must be a file name"
            faults.add(HeaderFault.INDEX_BAD_ENTRY, INDEX_NAME, what, tensor=tensor)
            continue
        if file not in inside:
            inside[file] = is_inside(file)
        if inside[file]:
            weight_map[tensor] = file
        else:
            what = f"file is {shown(file)}, and must be a plain path below the checkpoint's folder"
            fix = "Do not trust this checkpoint; get it from its publisher"
            faults.add(HeaderFault.PATH_ESCAPES, INDEX_NAME, what, tensor=tensor, fix=fix)
    return weight_map


def is_inside(file: str) -> bool:
    """Whether the *name* stays below its folder on every system. Links are not followed: the Hugging Face cache is
    made of links to `../../blobs`."""
    if "\\" in file or "\0" in file or re.match(r"[A-Za-z]:", file):
        return False
    return not any(part in ("", ".", "..") for part in file.split("/"))


def merge(
    weight_map: dict[str, str], shards: Iterable[ShardHeader], unreadable: set[str], faults: Faults
) -> dict[str, TensorInfo]:
    """All tensors of all shards, each exactly where the index says; `unreadable` shards are told already."""
    tensors: dict[str, TensorInfo] = {}
    more: dict[str, list[str]] = {}  # files of a tensor that lies in several
    for shard in shards:
        for tensor in shard.tensors:
            first = tensors.setdefault(tensor.name, tensor)
            if first is not tensor:
                more.setdefault(tensor.name, [first.file]).append(tensor.file)
    for name, files in more.items():
        what = f"lies in {len(files)} files, {shown(files)}, and must lie in one"
        faults.add(HeaderFault.TENSOR_IN_TWO_SHARDS, files[1], what, tensor=name)
    for name, tensor in tensors.items():
        if name not in weight_map:
            what = f"is not listed by {INDEX_NAME}"
            fix = f"{faults.damaged}, {INDEX_NAME} too: the two are of different versions"
            faults.add(HeaderFault.TENSOR_NOT_IN_INDEX, tensor.file, what, tensor=name, fix=fix)
    for name, file in weight_map.items():
        holder = tensors.get(name)
        files = more.get(name) or ([holder.file] if holder else [])
        if file not in files and file not in unreadable:
            what = f"is not in this file, where {INDEX_NAME} places it" + (f", but in {shown(files)}" if files else "")
            faults.add(HeaderFault.TENSOR_NOT_IN_SHARD, file, what, tensor=name)
    return tensors
