"""Checks that a method's groups of inputs fill the rows of every weight: one problem, with the size that works."""

from __future__ import annotations

import math
from collections import Counter

from distquant.config.checks import where
from distquant.errors import Problems
from distquant.planning.described import Described

SIZES = (128, 64, 32, 16, 8)
"""Group sizes that are offered, the most usual first."""

SHOWN = 3
"""Sizes of weights that a message lists."""


def check_groups(described: Described, problems: Problems) -> None:
    """Adds one problem for all weights whose inputs are not a multiple of the method's group size."""
    if described.prequantized or described.scheme.delegated:
        return  # what is stored has its groups already, and is judged tensor by tensor
    linears, scheme = described.description.linears, described.scheme
    shapes = {name: (linears[name].out_features, linears[name].in_features) for name in described.converted}
    sizes = {name: scheme.group_size(f"{name}.weight", shape) for name, shape in shapes.items()}
    wrong = [name for name, size in sizes.items() if size and linears[name].in_features % size]
    if not wrong:
        return
    size = sizes[wrong[0]]
    inputs = Counter(linears[name].in_features for name in wrong)
    examples = {linears[name].in_features: name for name in reversed(wrong)}
    listed = [
        f"{count} in {number} module{'s' * (number > 1)} ({examples[count]}{', ...' * (number > 1)})"
        for count, number in inputs.most_common(SHOWN)
    ]
    more = f" and {len(inputs) - SHOWN} other sizes" if len(inputs) > SHOWN else ""
    fault = (
        f"{size} does not fit {len(wrong)} of {len(described.converted)} modules, "
        f"whose in_features are not a multiple of it: {', '.join(listed)}{more}"
    )
    problems.add(where("group_size"), fault, _fix(described, len(wrong)))


def _fix(described: Described, wrong: int) -> str:
    """Returns the setting that works for all modules."""
    config, linears = described.scheme.config, described.description.linears
    common = math.gcd(*(linears[name].in_features for name in described.converted))
    size = next((size for size in SIZES if common % size == 0), None)
    skip = f"leave {'it' if wrong == 1 else 'them'} unquantized with {config.skip_field}" if config.skip_field else ""
    if size is None:
        other = "Take a method that fits any size, such as 'nf4' or 'gptq-rtn'"
        return f"{other}, or {skip}" if skip else other
    name = config.with_group_size(size)
    setting = f"group_size={size}" if name is None else f"group_size={size}: {name!r} has it"
    return f"Use {setting}; or {skip}" if skip else f"Use {setting}"
