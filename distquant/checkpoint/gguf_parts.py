"""The files of a split GGUF model: `NAME-00001-of-00003.gguf` and so on, as llama.cpp's gguf-split writes them.

The first one has all values; the others have tensors, and their numbers. Any of them names the model.
"""

from __future__ import annotations

import os
from pathlib import Path

from distquant.checkpoint.faults import Faults, HeaderFault, shown
from distquant.checkpoint.folders import SHARD, parts_of
from distquant.checkpoint.gguf import GgufHeader, parse_gguf


def open_parts(path: Path, faults: Faults) -> tuple[Path, list[GgufHeader]]:
    """Reads the headers of all files of a GGUF model, of which one is given; also returns the path of the first.

    Faults of any file, and missing ones, are added to `faults`.
    """
    given = parse_gguf(path, path.name, faults)
    if given is None:
        return path, []
    if given.parts == 1:
        if not given.architecture:
            faults.add(HeaderFault.BAD_ENTRY, path.name, "general.architecture is missing")
        return path, [given]
    match = SHARD.fullmatch(path.name)
    if match is None or int(match["count"]) != given.parts:
        reason = f"is one of {given.parts} files of a split model, and its name does not say which"
        fix = f"Name the files as gguf-split does: MODEL-00001-of-{given.parts:05d}.gguf, ..."
        faults.add(HeaderFault.BAD_ENTRY, path.name, reason, fix=fix)
        return path, []
    parts = parts_of(os.listdir(path.parent), match["base"], match["count"], match["end"])
    for part in parts.missing:
        name = f"{match['base']}-{part:05d}-of-{match['count']}{match['end']}"
        faults.add(HeaderFault.SHARD_MISSING, name, f"is missing in {path.parent}, beside {path.name}")
    first = path.with_name(f"{match['base']}-00001-of-{match['count']}{match['end']}")
    headers = [given if name == path.name else parse_gguf(path.parent / name, name, faults) for name in parts.names]
    read = [header for header in headers if header is not None]
    if not faults:
        _check_together(read, faults)
    return first, read


def _check_together(headers: list[GgufHeader], faults: Faults) -> None:
    """Adds the faults of files that do not make one model."""
    files: dict[str, str] = {}
    for number, header in enumerate(headers):
        name = header.shard.name
        if header.parts != len(headers) or header.part != number:
            reason = f"says that it is file {header.part + 1} of {header.parts}, not what its name says"
            faults.add(HeaderFault.BAD_ENTRY, name, reason)
        for tensor in header.shard.tensors:
            if tensor.name in files:
                reason = f"is stored in {shown([files[tensor.name], name])}, not in one file"
                faults.add(HeaderFault.TENSOR_IN_TWO_SHARDS, name, reason, tensor=tensor.name)
            files[tensor.name] = name
    if not headers[0].architecture:
        faults.add(HeaderFault.BAD_ENTRY, headers[0].shard.name, "general.architecture is missing")
