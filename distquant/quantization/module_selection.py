"""The linears that GPTQ and its kin quantize: those in the blocks, and the output head only where a config names it.

A stack of experts is one entry of `ModelDescription.linears`, named with a star for the number of the expert
(`model.layers.0.mlp.experts.*.gate_proj`). Configurations name modules of checkpoints, so their rules are read for
each expert and must agree on all of them. The first expert stands for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from distquant.config.selection import layer_of
from distquant.errors import Problem
from distquant.model.description import STAR, ModelDescription
from distquant.model.module_names import ModuleNames

NUMBER = f".{STAR}."
"""The place of an expert's number in the name of a stack."""


def is_stack(name: str) -> bool:
    """True if an entry of `description.linears` stands for all experts of a layer."""
    return NUMBER in name


def in_blocks(
    description: ModelDescription, blocks: Iterable[str] | None = None, names_of: ModuleNames | None = None
) -> list[str]:
    """Linears inside of blocks: of the named module lists, or of any that numbers its members.

    The modules that transformers never quantizes (tied weights, the output head) are left out. `names_of` gives the
    names by which a list may be known.
    """
    known = names_of or ModuleNames()
    names = [name for name in description.linears if name not in description.default_skip]
    if blocks is None:
        return [name for name in names if layer_of(name) is not None]
    inside = tuple(f"{block}." for block in blocks)
    return [name for name in names if any(f"{one}.".startswith(inside) for one in known.of(first_expert_name(name)))]


def first_expert_name(name: str) -> str:
    """The name of a stack's first expert; other names as they are.

    >>> first_expert_name("model.layers.0.mlp.experts.*.gate_proj")
    'model.layers.0.mlp.experts.0.gate_proj'
    """
    return name.replace(NUMBER, ".0.")


def members(description: ModelDescription, name: str) -> list[str]:
    """Modules that an entry of `description.linears` stands for: all experts of a stack, or the module itself."""
    if not is_stack(name):
        return [name]
    return [name.replace(NUMBER, f".{number}.") for number in range(description.params[f"{name}.weight"].shape[0])]


def disagreements(description: ModelDescription, rule_of: Callable[[str], Any]) -> Iterator[Problem]:
    """Yields a problem where the rules of a configuration differ between the experts of a stack.

    Args:
        description: of the model.
        rule_of: what the configuration says of a module.
    """
    stacks = []
    for name in filter(is_stack, description.linears):
        first, *others = members(description, name)
        rule = rule_of(first)
        stacks += [(name, first, other) for other in others if rule_of(other) != rule][:1]
    if stacks:
        name, first, other = stacks[0]
        more = f" (and {len(stacks) - 1} more such stacks)" if len(stacks) > 1 else ""
        fault = f"the config stores {other} in another way than {first}{more}, and experts of a layer are kept alike"
        yield Problem(name, fault, "Give all experts of a layer the same rules, or load the original")
