"""All names of a linear module: the model's, those of its tensors in the checkpoint, and those under other wrappers.

A configuration names modules as the tool that wrote it did: as the files do, as a model around the text model does, or
as another version of transformers. All rules about modules are therefore matched against all names, here alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

from distquant.model.description import STAR, Source
from distquant.whole_numbers import whole_number

WRAPPERS = (
    "model.language_model.model.", "language_model.model.", "model.language_model.", "language_model.",
    "model.text_model.", "text_model.", "model.model.", "model.", "",
)  # fmt: skip
"""Prefixes of one text model in its own class, in a multimodal one, and in older versions; longer ones first."""

OUTER = ("model.", "")
"""Prefixes of the other parts of a multimodal model."""

_OTHER_PART = re.compile(r"(^|\.|_)(vision|visual|audio|speech|image|projector|connector|merger|modal)")


class ModuleNames:
    """The names of modules, from the tensors that fill their weights.

    Args:
        sources: parameter -> its checkpoint tensors.
        wrapped: True to know modules by the names under other wrappers, too.
    """

    def __init__(self, sources: Mapping[str, Iterable[Source]] | None = None, wrapped: bool = False):
        self._sources = sources or {}
        self.wrapped = wrapped
        self._known: dict[str, tuple[str, ...]] = {}

    def of(self, module: str) -> tuple[str, ...]:
        """Returns the names of a module, or of one expert of a stack; the model's own comes first."""
        if module not in self._known:
            names = dict.fromkeys((module, *self._stored(module)))
            if self.wrapped:
                names |= dict.fromkeys(other for name in tuple(names) for other in wrapped_names(name))
            self._known[module] = tuple(names)
        return self._known[module]

    def _stored(self, module: str) -> Iterable[str]:
        """Yields the names that the checkpoint's tensors give a module."""
        weight = f"{module}.weight"
        if weight in self._sources:
            yield from (owner(source.tensor) for source in self._sources[weight])
            return
        for number in re.finditer(r"(?<=\.)\d+(?=\.)", weight):
            stack = f"{weight[: number.start()]}{STAR}{weight[number.end() :]}"
            for source in self._sources.get(stack, ()):
                if source.offset is None or source.offset[0] == whole_number(number[0]):
                    yield owner(source.tensor)

    def matching(self, pattern: str, module: str, matches: Callable[[str, str], bool]) -> bool:
        """Returns True if a rule means a module.

        Args:
            pattern: the rule's.
            module: the model's name.
            matches: compares the pattern with a name.
        """
        return matches_any(pattern, self.of(module), matches)


def matches_any(pattern: str, names: Iterable[str], matches: Callable[[str, str], bool]) -> bool:
    """Returns True if a pattern matches one of a module's names; if it excludes names, it must match all of them."""
    excludes = "(?!" in pattern or "(?<!" in pattern
    return (all if excludes else any)(matches(pattern, name) for name in names)


def owner(tensor: str) -> str:
    """Returns the module of a checkpoint tensor.

    >>> owner("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4")
    'model.layers.0.mlp.up_proj'
    """
    return tensor.rpartition(".weight.")[0] or tensor.rpartition(".")[0]


@lru_cache(maxsize=1 << 14)
def wrapped_names(name: str) -> tuple[str, ...]:
    """Returns a module's names under other wrappers.

    >>> wrapped_names("model.vision_tower.proj")
    ('model.vision_tower.proj', 'vision_tower.proj')
    """
    outer = name.removeprefix("model.")
    if _OTHER_PART.search(outer.partition(".")[0]):
        return tuple(prefix + outer for prefix in OUTER)
    inner = next(name.removeprefix(prefix) for prefix in WRAPPERS if name.startswith(prefix))
    return tuple(prefix + inner for prefix in WRAPPERS)
