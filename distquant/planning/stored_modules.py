"""The modules that a checkpoint stores quantized: its files say so, and the lists of its config are checked.

Lists of modules in configurations are often in names that the files do not have, incomplete, or from another version of
the model. What is stored is plain from the tensors: a quantized weight has components, another one is a `weight` of
floats in the model's shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from distquant.checkpoint import TensorInfo
from distquant.model import PLAIN_FLOATS, STAR, Linear, ModelDescription, source_numel
from distquant.quantization import Scheme


@dataclass(frozen=True, slots=True)
class StoredModules:
    """The modules to convert in a quantized checkpoint, and where its config disagrees.

    Attributes:
        converted: modules that are stored quantized.
        unlisted: those of them that the config leaves unquantized.
        plain: modules that the config has quantized, and that are stored unquantized.
    """

    converted: tuple[str, ...]
    unlisted: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()


def stored_modules(
    description: ModelDescription, scheme: Scheme, tensors: Mapping[str, TensorInfo], listed_by_user: bool
) -> StoredModules:
    """Returns the modules that are stored quantized.

    Args:
        description: the model, with the checkpoint's tensors in their places.
        scheme: the checkpoint's method, with the names of the model's modules.
        tensors: headers, by name in the checkpoint.
        listed_by_user: True if the user gave the list of modules: that one is a request, and leaves modules out.
    """
    # Of tied parameters the description has only the source, so the other's module has no weight there.
    weights = [name for name in description.linears if f"{name}.weight" in description.params]
    asked = [name for name in scheme.select_modules(description) if f"{name}.weight" in description.params]
    if not scheme.suffixes:  # its weights have no components by which they are known
        return StoredModules(tuple(asked))
    found = {name: is_quantized(description, scheme, tensors, name) for name in weights}
    unlisted = () if listed_by_user else tuple(n for n in weights if found[n] and n not in set(asked))
    return StoredModules(
        converted=(*(name for name in asked if found[name] is not False), *unlisted),
        unlisted=unlisted,
        plain=tuple(name for name in asked if found[name] is False),
    )


def is_quantized(
    description: ModelDescription, scheme: Scheme, tensors: Mapping[str, TensorInfo], name: str
) -> bool | None:
    """Returns True if a module's weight is stored quantized, False if not, None if the files do not tell."""
    sources, linear = description.sources.get(f"{name}.weight", ()), description.linears[name]
    components = {source.component for source in sources}
    if components - scheme.of_activations - {""}:
        return True if scheme.can_be_stored(linear) else None
    own = [source for source in sources if not source.component]
    if any(tensors[source.tensor].dtype not in PLAIN_FLOATS for source in own):
        if linear.experts:
            return False  # codes without scales in one tensor of all experts: not the method's form
        return True if scheme.can_be_stored(linear) and _has_codes_as_weight(scheme, linear) else None
    stored = sum(source_numel(source, tensors[source.tensor].shape) for source in own)
    return False if own and stored == math.prod(description.params[f"{name}.weight"].shape) else None


def _has_codes_as_weight(scheme: Scheme, linear: Linear) -> bool:
    """Returns True if the method stores codes under the name of the weight itself."""
    one = f"{linear.name}.weight".replace(STAR, "0")
    layout = scheme.layout(one, (linear.out_features, linear.in_features), "float32")
    return any(not component.name for component in layout.components)


def disagreements(stored: StoredModules) -> Iterator[str]:
    """Yields notes where the config's lists are not what is stored."""
    for names, fault in (
        (stored.unlisted, "stored quantized, though the config leaves them out"),
        (stored.plain, "stored unquantized, though the config has them quantized"),
    ):
        if names:
            more = " ..." if len(names) > LISTED else ""
            yield f"{fault}: {len(names)} linear modules ({', '.join(names[:LISTED])}{more}); the files decide"


LISTED = 3
"""Names that a note lists."""
