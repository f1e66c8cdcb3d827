"""`model.safetensors.index.json`: the map of tensors to shards, compared with the shards' own headers.

Written by `save_pretrained`: `{"metadata": {...}, "weight_map": {tensor: file}}`. `metadata.total_size` is ignored,
because published checkpoints often have it wrong and nothing here needs it.

The index decides. Tools that edit a checkpoint leave tensors behind that it does not list, or old copies of some that
it lists in another file; and some list tensors that were never stored.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from distquant.checkpoint.faults import MOST_NAME, NAME_SHOWN, Fault, Faults, HeaderFault, long_name, shown
from distquant.checkpoint.headers import ShardHeader, TensorInfo, load_json
from distquant.files import INDEX_BYTES, read_file

INDEX_NAME = "model.safetensors.index.json"

LISTED = 3
"""Tensors that a note names."""


def read_index(folder: Path, faults: Faults) -> dict[str, str]:
    """Reads the weight map, tensor name -> file name; a file name outside the folder is a fault and left out."""
    try:
        document = load_json(read_file(folder / INDEX_NAME, INDEX_BYTES), INDEX_NAME, faults)
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
        if len(tensor) > MOST_NAME:
            faults.add(HeaderFault.INDEX_BAD_ENTRY, INDEX_NAME, long_name(tensor), tensor=tensor)
            continue
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


@dataclass(frozen=True, slots=True)
class Merged:
    """The tensors of a sharded checkpoint, as its index decides, and all that is odd about them.

    Attributes:
        tensors: the copy of each tensor that counts, in the order of files and offsets.
        unlisted: tensor that the index does not list -> its file. It does not belong to the model.
        stale: tensor -> the files of further copies, where the index lists another.
        moved: tensor -> the only file that has it, where the index lists another.
        absent: listed tensor that no file has -> the fault, for a model that needs it.
    """

    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    unlisted: dict[str, str] = field(default_factory=dict)
    stale: dict[str, tuple[str, ...]] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    absent: dict[str, Fault] = field(default_factory=dict)

    def notes(self) -> Iterator[str]:
        """Yields notes on what the index decides."""
        if self.unlisted:
            yield f"ignored: {_tensors(self.unlisted)} that {INDEX_NAME} does not list ({_examples(self.unlisted)})"
        if self.stale:
            where = {name: self.tensors[name].file for name in self.stale}
            yield f"stored twice: {_tensors(self.stale)}; the copy that {INDEX_NAME} lists is read ({_examples(where)})"
        if self.moved:
            yield f"read from another file than {INDEX_NAME} lists: {_tensors(self.moved)} ({_examples(self.moved)})"


def _tensors(names: Collection[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names):,} tensors"


def _examples(files: Mapping[str, str]) -> str:
    """Returns the first tensors and their files."""
    first = [f"{name[:NAME_SHOWN]} in {file[:NAME_SHOWN]}" for name, file in list(files.items())[:LISTED]]
    return ", ".join(first) + (", ..." if len(files) > LISTED else "")


def merge(
    weight_map: dict[str, str], shards: Iterable[ShardHeader], missing: Mapping[str, Fault], faults: Faults
) -> Merged:
    """Returns the tensors of all shards: the index decides which copy of a tensor counts.

    Args:
        weight_map: tensor name -> file name, from the index.
        shards: headers of the files that could be read.
        missing: files that are not there, each with its fault.
        faults: collects tensors of which nothing says which copy counts.
    """
    copies: dict[str, list[TensorInfo]] = {}
    for shard in shards:
        for tensor in shard.tensors:
            copies.setdefault(tensor.name, []).append(tensor)
    read = {shard.name for shard in shards}
    merged, chosen = Merged(), dict[str, TensorInfo]()
    for name, stored in copies.items():
        listed = weight_map.get(name)
        if listed is None:
            merged.unlisted[name] = stored[0].file
            continue
        own = next((tensor for tensor in stored if tensor.file == listed), None)
        if own is not None:
            chosen[name] = own
            if others := tuple(tensor.file for tensor in stored if tensor is not own):
                merged.stale[name] = others
        elif listed in read and len(stored) == 1:
            chosen[name] = stored[0]
            merged.moved[name] = stored[0].file
        elif listed in read:
            reason = f"is stored in {shown([tensor.file for tensor in stored])}, and {INDEX_NAME} lists it in {listed}"
            fix = f"Get the {INDEX_NAME} that belongs to these files"
            faults.add(HeaderFault.TENSOR_IN_TWO_SHARDS, stored[0].file, reason, tensor=name, fix=fix)
    for name, file in weight_map.items():
        if name in chosen or (name in copies and file in read):
            continue
        if file in missing:
            merged.absent[name] = missing[file]
        elif file in read:
            reason = f"is in no file, though {INDEX_NAME} lists it"
            where = f"{file[:NAME_SHOWN]}: tensor {shown(name)}"
            merged.absent[name] = Fault(where, reason, faults.damaged, HeaderFault.TENSOR_NOT_IN_SHARD, file)
    files = {shard.name: number for number, shard in enumerate(shards)}
    ordered = sorted(chosen.values(), key=lambda tensor: (files[tensor.file], tensor.offset))
    merged.tensors.update((tensor.name, tensor) for tensor in ordered)
    return merged
