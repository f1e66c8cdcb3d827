"""`model.safetensors.index.json`: which shard holds which tensor, and whether the shards agree.

Written by `save_pretrained`: `{"metadata": {...}, "weight_map": {tensor: file}}`. `metadata.total_size` is not looked
at, because published checkpoints often get it wrong and nothing here needs it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from distquant.checkpoint.faults import Faults, HeaderFault, shown
from distquant.checkpoint.header import ShardHeader, TensorInfo, load_json

INDEX_NAME = "model.safetensors.index.json"


def read_index(folder: Path, faults: Faults) -> dict[str, str]:
    """The weight map (tensor name to file name); names that leave the folder are told and left out."""
    try:
        document = load_json((folder / INDEX_NAME).read_bytes().decode(), INDEX_NAME, faults)
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})"
        faults.add(HeaderFault.UNREADABLE, INDEX_NAME, what, fix="Check the file's permissions")
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
    for tensor, file in found.items():
        if not isinstance(file, str):
            what = f"file is {shown(file)}, and must be a file name"
            faults.add(HeaderFault.INDEX_BAD_ENTRY, INDEX_NAME, what, tensor=tensor)
        elif not is_inside(file):
            what = f"file is {shown(file)}, and must be a plain path below the checkpoint's folder"
            fix = "Do not trust this checkpoint; get it from its publisher"
            faults.add(HeaderFault.PATH_ESCAPES, INDEX_NAME, what, tensor=tensor, fix=fix)
        else:
            weight_map[tensor] = file
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
    holders: dict[str, list[TensorInfo]] = defaultdict(list)
    for shard in shards:
        for tensor in shard.tensors:
            holders[tensor.name].append(tensor)
    for name, found in holders.items():
        if len(found) > 1:
            files = [tensor.file for tensor in found]
            what = f"lies in {len(files)} files, {shown(files)}, and must lie in one"
            faults.add(HeaderFault.TENSOR_IN_TWO_SHARDS, files[1], what, tensor=name)
        if name not in weight_map:
            what = f"is not listed by {INDEX_NAME}"
            fix = f"{faults.damaged}, {INDEX_NAME} too: the two are of different versions"
            faults.add(HeaderFault.TENSOR_NOT_IN_INDEX, found[0].file, what, tensor=name, fix=fix)
    for name, file in weight_map.items():
        files = [tensor.file for tensor in holders.get(name, ())]
        if file not in files and file not in unreadable:
            what = f"is not in this file, where {INDEX_NAME} places it" + (f", but in {shown(files)}" if files else "")
            faults.add(HeaderFault.TENSOR_NOT_IN_SHARD, file, what, tensor=name)
    return {name: found[0] for name, found in holders.items()}
