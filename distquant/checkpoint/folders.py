"""The files of a checkpoint's folder: which of them hold the weights, and advice where none do."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distquant.checkpoint.faults import Faults, HeaderFault, shown
from distquant.checkpoint.index import INDEX_NAME

SINGLE_NAME = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
"""PEFT's configuration of an adapter; beside a whole model, transformers applies the adapter."""

SHARD = re.compile(r"(?P<base>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})(?P<end>\.safetensors|\.gguf)")
"""The name of one of several files, as `save_pretrained` and llama.cpp number them."""

_PICKLED = "Pickled weights are not read: load with transformers and save_pretrained() once"

_OTHER_FORMATS: Mapping[str, str] = {
    r"adapter_model\.safetensors": "This is a PEFT adapter: give the base model, and this folder as adapter=FOLDER "
    "(--adapter FOLDER)",
    r"consolidated.*\.safetensors": "This is Mistral's own format: take the files of transformers' format from the "
    "same repository, or convert it with convert_mistral_weights_to_hf.py of transformers",
    r"consolidated.*\.pth": "This is Meta's own format: take the files of transformers' format from the same "
    "repository, or convert it with convert_llama_weights_to_hf.py of transformers",
    r".*\.gguf": "Give the path of the .gguf file itself",
    r".*\.(bin|pt|pth)(\.index\.json)?": _PICKLED,
    r".*\.safetensors\.index\.json": f"Name the index {INDEX_NAME}",
}
"""Names of files -> what to do with a folder that has no others."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Files of one checkpoint that are numbered, and the numbers that are not there."""

    names: tuple[str, ...]
    missing: tuple[int, ...]


def parts_of(names: list[str], base: str, count: str, end: str) -> Parts:
    """Returns the files `BASE-00001-of-COUNT` and so on among names."""
    known, every = set(names), range(1, int(count) + 1)
    files = {part: f"{base}-{part:05d}-of-{count}{end}" for part in every}
    return Parts(
        tuple(name for name in files.values() if name in known),
        tuple(part for part, name in files.items() if name not in known),
    )


def shards_without_index(folder: Path, faults: Faults) -> list[str]:
    """Returns the shards of a folder without an index, if all of them are there; adds a fault where they are not."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        reason = f"cannot be listed ({error.strerror or error})"
        faults.add(HeaderFault.UNREADABLE, str(folder), reason, fix="Check the folder's permissions")
        return []
    found = [match for name in names if (match := SHARD.fullmatch(name)) and match["end"] == ".safetensors"]
    series = {(m["base"], m["count"]) for m in found if not m["base"].startswith(("consolidated", "adapter_model"))}
    if len(series) != 1:
        _add_no_checkpoint(folder, names, faults)
        return []
    ((base, count),) = series
    parts = parts_of(names, base, count, ".safetensors")
    if parts.missing:
        numbers = ", ".join(f"{part:05d}" for part in parts.missing[:12]) + (" ..." if len(parts.missing) > 12 else "")
        reason = f"holds {len(parts.names)} of {int(count)} shards and no {INDEX_NAME}; missing: {numbers}"
        faults.add(HeaderFault.NO_CHECKPOINT, str(folder), reason, fix=f"{faults.damaged}, {INDEX_NAME} too")
        return []
    return list(parts.names)


def _add_no_checkpoint(folder: Path, names: list[str], faults: Faults) -> None:
    """Adds the fault of a folder without safetensors, with advice that fits the files in it."""
    fix = next(
        (fix for pattern, fix in _OTHER_FORMATS.items() if any(re.fullmatch(pattern, name) for name in names)), None
    )
    if fix is None:
        single = [name for name in names if name.endswith(".safetensors")]
        fix = "Give the folder that save_pretrained() or `hf download` wrote"
        if len(single) == 1:
            fix = f"If {single[0]} holds the whole model, rename it to {SINGLE_NAME}"
    there = shown(names) if names else "an empty folder"
    reason = f"holds neither {SINGLE_NAME} nor {INDEX_NAME}; found: {there}"
    faults.add(HeaderFault.NO_CHECKPOINT, str(folder), reason, fix=fix)
