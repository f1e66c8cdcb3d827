"""Selection of the modules to quantize: names to skip, names to include, and layer ranges.

A pattern matches a dotted module name as in transformers' `should_convert_module` (`quantizers/quantizers_utils.py`):
as a regular expression from the start of the name up to a module boundary, or as a plain suffix. `layer.1` matches
`layer.1.attn` and not `layer.11.attn`; `lm_head` matches `model.lm_head`. The children of a module are matched only
from the start of the name: `mlp` does not match `layers.0.mlp.up_proj`, `.*mlp` does.

All experts of a module are quantized alike: a pattern that matches the first of them means all.

The layer of a module is the first integer in its dotted name: 3 in `model.layers.3.mlp.experts.5.up_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from distquant.config.values import did_you_mean
from distquant.errors import LISTED, Problem
from distquant.patterns import InvalidPattern, Pattern, compiled, shortened, too_many
from distquant.whole_numbers import MOST_DIGITS, whole_number


def _compiled(pattern: str) -> Pattern:
    return compiled(rf"(?:{pattern})(?:(?<=\.)|(?=\.)|$)", pattern)


def matches(pattern: str, name: str) -> bool:
    """Returns True if a pattern names this module, or a parent of it.

    One projection of all experts, with a star for their number, is matched as the first expert's, and by a suffix of
    the path of the module that holds them.
    """
    module, star, _ = name.partition(".*.")
    if star:
        return module.endswith(pattern) or matches(pattern, name.replace(star, ".0."))
    return name.endswith(pattern) or _compiled(pattern).match(name)


@lru_cache(maxsize=256)
def parse_layers(text: str) -> tuple[tuple[int, int], ...]:
    """Parses `"2-5,7"` into inclusive ranges `((2, 5), (7, 7))`; raises `ValueError` for other spellings."""
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)(?:\s*-\s*([0-9]+))?\s*", part)
        if not match:
            raise ValueError(f"{part.strip()!r} is neither a layer nor a range")
        first, last = whole_number(match[1]), whole_number(match[2] or match[1])
        if first is None or last is None:
            raise ValueError(f"{shortened(part.strip())} has more than {MOST_DIGITS} digits")
        if last < first:
            raise ValueError(f"{part.strip()!r} runs backwards")
        ranges.append((first, last))
    return tuple(ranges)


@lru_cache(maxsize=1 << 16)
def layer_of(name: str) -> int | None:
    """Returns the first integer component of a dotted name, or None outside the layers."""
    return next((number for part in name.split(".") if (number := whole_number(part)) is not None), None)


@dataclass(frozen=True, slots=True)
class ModuleSelection:
    """The modules to convert: those that are included, belong to the layers, and are not skipped.

    A module outside every layer (an `lm_head`) is not selected where `layers` is given.
    """

    skip: tuple[str, ...] | None = None
    """Patterns of modules that are left unquantized; None skips nothing."""
    include: tuple[str, ...] | None = None
    """Patterns of the only modules to convert; None includes all."""
    layers: str | None = None
    """Ranges of the only layers to convert, such as `"2-5,7"`; None takes all."""

    def selects(self, name: str, matching: Callable[[str, str], bool] = matches) -> bool:
        """Returns True if the module of this dotted name is to be converted.

        Args:
            name: the model's.
            matching: compares a pattern with this module, which may have other names, too.
        """
        if self.include is not None and not any(matching(pattern, name) for pattern in self.include):
            return False
        if self.layers is not None:
            layer = layer_of(name)
            if layer is None or not any(first <= layer <= last for first, last in parse_layers(self.layers)):
                return False
        return not any(matching(pattern, name) for pattern in self.skip or ())

    def problems(self, skip_name: str = "skip", include_name: str = "include_modules") -> list[Problem]:
        """Returns problems of the patterns themselves; the arguments are the options' names in messages."""
        problems = []
        for option, patterns in ((skip_name, self.skip), (include_name, self.include)):
            if (reason := too_many(patterns or ())) is not None:
                problems.append(Problem(option, reason, "Join some of them, or write module names."))
                continue
            for pattern in patterns or ():
                if not pattern:
                    problems.append(Problem(option, "'' matches every module", "Remove the empty pattern."))
                    continue
                try:
                    _compiled(pattern)
                except InvalidPattern as error:
                    fix = "Give a module name, or escape what is meant literally."
                    problems.append(Problem(option, f"{shortened(pattern)} is not a regular expression ({error})", fix))
        if self.include == ():
            problems.append(Problem(include_name, "includes no module", "Remove it to include all, or name some."))
        if self.layers is not None:
            try:
                parse_layers(self.layers)
            except ValueError as error:
                fault = f"{shortened(self.layers)}: {error}"
                problems.append(Problem("layers", fault, "Write ranges such as '2-5,7'."))
        return problems

    def unmatched(self, names: Iterable[str]) -> list[Problem]:
        """Returns the patterns that match no module, with near matches, and layers that the model does not have.

        Args:
            names: the model's leaf modules. (A pattern that names only a container would convert or skip nothing.)
        """
        names = list(names)
        problems = []
        for option, patterns in (("skipped modules", self.skip), ("include_modules", self.include)):
            missed = [each for each in patterns or () if not any(matches(each, name) for name in names)]
            vocabulary = _vocabulary(names) if missed else set()
            for pattern in missed[:LISTED]:  # looking for near matches takes long
                fix = did_you_mean(pattern, vocabulary) or "Name a module of this model, or remove it."
                problems.append(Problem(option, f"{shortened(pattern)} matches no module", fix))
            if (left := len(missed) - LISTED) > 0:
                problems.append(Problem(option, f"{left} more patterns match no module", "Remove them."))
        if self.layers is not None:
            problems += _missing_layers(self.layers, names)
        return problems


def _missing_layers(layers: str, names: list[str]) -> list[Problem]:
    have = {layer for layer in map(layer_of, names) if layer is not None}
    extent = f"This model's layers are {min(have)} to {max(have)}." if have else "This model has no numbered layers."
    problems = []
    for first, last in parse_layers(layers):
        if not any(first <= layer <= last for layer in have) or last > max(have):
            text = f"{first}-{last}" if last > first else str(first)
            problems.append(Problem("layers", f"{text} reaches beyond the model", extent))
    return problems


def _vocabulary(names: Iterable[str]) -> set[str]:
    """Returns the patterns to suggest: names with `*` for integers, last components, and `.*` before inner ones."""
    words = set()
    for name in names:
        parts = name.split(".")
        words.add(".".join("*" if part.isdigit() else part for part in parts))
        words.add(parts[-1])
        words.update(f".*{part}" for part in parts[:-1] if not part.isdigit())
    return words
