"""Which linears GPTQ and its kin quantize: those inside the blocks, and the output head only where a config says so.

A stack of experts is one entry of `ModelDescription.linears`, named with a star for the number of the expert
(`model.layers.0.mlp.experts.*.gate_proj`). Configurations name modules of checkpoints, so their rules are read for
each expert, and must say the same of all: `one_of` is the expert that stands for the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from distquant.config.selection import layer_of
from distquant.errors import Problem
from distquant.model.description import ModelDescription

STAR = ".*."
"""The number of an expert, in the name of a stack."""


def in_blocks(description: ModelDescription, blocks: Iterable[str] | None = None) -> list[str]:
    """Linears inside of blocks: of the named module lists, or of any that numbers its members.

    What transformers never quantizes (tied weights, the output head) is left out.
    """
    names = [name for name in description.linears if name not in description.default_skip]
    if blocks is None:
        return [name for name in names if layer_of(name) is not None]
    return [name for name in names if any(name == block or name.startswith(f"{block}.") for block in blocks)]


def compiles(pattern: str) -> str | None:
    """Why a pattern is no regular expression; None where it is one."""
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return None


def one_of(name: str) -> str:
    """The first expert of a stack; other names as they are.

    >>> one_of("model.layers.0.mlp.experts.*.gate_proj")
    'model.layers.0.mlp.experts.0.gate_proj'
    """
    return name.replace(STAR, ".0.")


def members(description: ModelDescription, name: str) -> list[str]:
    """Modules that an entry of `description.linears` stands for: all experts of a stack, or the module itself."""
    if STAR not in name:
        return [name]
    return [name.replace(STAR, f".{number}.") for number in range(description.params[f"{name}.weight"].shape[0])]


def stored_names(description: ModelDescription, name: str) -> set[str]:
    """What the model and the checkpoint call the modules that an entry of `description.linears` stands for."""
    sources = description.sources.get(f"{name}.weight", ())
    return {*members(description, name), *(source.tensor.rpartition(".")[0] for source in sources)}


def unlike(description: ModelDescription, fact: Callable[[str], Any]) -> Iterator[Problem]:
    """Stacks of whose experts a configuration does not say the same; `fact` is what it says of a module."""
    found = []
    for name in description.linears:
        if STAR in name:
            first, *others = members(description, name)
            said = fact(first)
            found += [(name, first, other) for other in others if fact(other) != said][:1]
    if found:
        name, first, other = found[0]
        more = f" (and {len(found) - 1} more such stacks)" if len(found) > 1 else ""
        what = f"the config stores {other} in another way than {first}{more}, and experts of a layer are kept alike"
        yield Problem(name, what, "Give all experts of a layer the same rules, or load the original")
