"""Looks for tensors that a model needs and a checkpoint seems to lack: under other names, and in files and lists that
were not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from distquant.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, Fault, HeaderFault
from distquant.errors import Problem, folded
from distquant.model import ModelDescription, Placer

WRAPPERS: Mapping[str, tuple[str, str]] = {
    r"(?<![^.])_orig_mod\.": ("torch.compile", "Save the module inside (model._orig_mod)"),
    r"(?<![^.])(_fsdp_wrapped_module|_checkpoint_wrapped_module)\.": ("FSDP", "Save the full state dict of FSDP"),
    r"^_forward_module\.": ("Lightning Fabric", "Save the module inside (model.module)"),
    r"^module\.": ("DistributedDataParallel or DeepSpeed", "Save the module inside (model.module)"),
    r"^base_model\.model\.|(?<![^.])base_layer\.": ("PEFT", "Save model.merge_and_unload()"),
}
"""Part of a name -> what puts it there, and how to save a model without it."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Tensors of parameters that seem to be missing, and where they are.

    Attributes:
        tensors: parameter -> the tensor, as a message names it.
        fault: goes on from "3 parameters".
        fix: the advice.
    """

    tensors: Mapping[str, str]
    fault: str
    fix: str

    def problem(self, names: Sequence[str]) -> Problem:
        """Returns the problem of some of the parameters, given in the order of the model."""
        first = next((self.tensors[name] for name in names if name in self.tensors), next(iter(self.tensors.values())))
        count = "1 parameter is" if len(names) == 1 else f"{len(names):,} parameters are"
        return Problem(names[0], f"{count} {self.fault} ({first})", self.fix)


def absent_faults(checkpoint: Checkpoint, description: ModelDescription, placer: Placer) -> list[Fault]:
    """Returns the faults of tensors that the index lists and no file has, as far as the model needs them."""
    optional = {name for name in description.params if name not in description.sources} - set(description.missing)
    needed = [f for name, f in checkpoint.absent.items() if placer(name) in description.params.keys() - optional]
    files = [fault for fault in dict.fromkeys(needed) if fault.fault is HeaderFault.SHARD_MISSING]
    tensors = [fault for fault in needed if fault.fault is not HeaderFault.SHARD_MISSING]
    return [*files, *(Fault(p.where, p.what, p.fix, HeaderFault.TENSOR_NOT_IN_SHARD, "") for p in folded(tensors))]


def find_elsewhere(checkpoint: Checkpoint, description: ModelDescription, placer: Placer) -> tuple[Elsewhere, ...]:
    """Looks for the tensors of missing parameters under other names, and in files and lists that were not read.

    Args:
        checkpoint: its files.
        description: the model, with the tensors in their places.
        placer: returns the parameter that a tensor of a name fills.
    """
    missing = set(description.missing)
    missing = set(description.missing)
    found = list(_wrapped(description.unexpected, missing, placer)) or list(_prefixed(description.unexpected, missing))
    left = missing - {target for each in found for target in each.tensors}
    unlisted = {name: f"{name} in {file}" for name, file in checkpoint.unlisted.items()}
    for names, fault, fix in (
        (unlisted, UNLISTED, f"Get the {INDEX_NAME} that belongs to these files, or remove it"),
        ({name: name for name in checkpoint.hidden}, HIDDEN, HIDDEN_FIX),
    ):
        tensors = {target: shown for name, shown in names.items() if (target := placer(name)) in left}
        if tensors:
            found.append(Elsewhere(tensors, fault, fix))
            left -= tensors.keys()
    return tuple(found)


UNLISTED = "in files whose index does not list them"
HIDDEN = f"not in {SINGLE_NAME}, which comes before the index that lists them"
HIDDEN_FIX = f"Remove or rename {SINGLE_NAME}, if the shards of {INDEX_NAME} are the model"


def _wrapped(unexpected: Iterable[str], missing: set[str], placer: Placer) -> Iterator[Elsewhere]:
    """Yields the parameters whose tensors have names of a wrapper around the model, or around modules in it."""
    known: dict[tuple[str, ...], dict[str, str]] = {}
    for name in unexpected:
        bare = name
        patterns: list[str] = []
        for _ in range(3):  # a compiled model in DDP has two
            for pattern in WRAPPERS:
                without = re.sub(pattern, "", bare)
                if without != bare:
                    bare, patterns = without, [*patterns, pattern]
        target = placer(bare)
        if patterns and target in missing:
            known.setdefault(tuple(dict.fromkeys(patterns)), {}).setdefault(target, name)
    for found, tensors in known.items():
        tools = " and ".join(WRAPPERS[pattern][0] for pattern in found)
        fix = f"{'; '.join(WRAPPERS[pattern][1] for pattern in found)}, or rename the tensors"
        yield Elsewhere(tensors, f"stored under names of {tools}", fix)


def _prefixed(unexpected: Iterable[str], missing: set[str]) -> Iterator[Elsewhere]:
    """Yields the parameters whose tensors have one more prefix, if it is the same for most of them."""
    tensors: dict[str, dict[str, str]] = {}
    for name in unexpected:
        parts = name.split(".")
        for start in range(1, len(parts) - 1):
            if (target := ".".join(parts[start:])) in missing:
                tensors.setdefault(name[: -len(target)], {})[target] = name
                break
    prefix = max(tensors, key=lambda each: len(tensors[each]), default="")
    if prefix and 2 * len(tensors[prefix]) > len(missing):
        fix = f"Rename the tensors without {prefix!r}, or check that config.json belongs to them"
        yield Elsewhere(tensors[prefix], f"stored under names that begin with {prefix!r}", fix)
