"""Problems of stored components, as several methods report them."""

from __future__ import annotations

from collections.abc import Mapping

from distquant.errors import Problem

SCALE_DTYPES = ("F32", "BF16", "F16")
"""Safetensors' dtypes that scales may have."""

OTHER_CHECKPOINT = "The checkpoint is of another model or method; check config.json"


def lacks(name: str, components: str) -> Problem:
    """The checkpoint has no such components of a weight."""
    fault = f"the checkpoint lacks {components} of this quantized weight"
    return Problem(name, fault, "Download the checkpoint again, or quantize the original")


def misshapen(name: str, component: str, stored: tuple[int, ...], expected: tuple[int, ...]) -> Problem:
    """A component has another size than its configuration and the weight's shape need."""
    fault = f"{component or 'weight'} is stored as {list(stored)}, its config and shape need {list(expected)}"
    return Problem(name, fault, OTHER_CHECKPOINT)


def in_other_dims(name: str, component: str, stored: tuple[int, ...], *allowed: tuple[int, ...]) -> Problem:
    """A component has as many elements as it needs, in other dims."""
    needs = " or ".join(str(list(shape)) for shape in allowed)
    return Problem(name, f"{component or 'weight'} is stored as {list(stored)}, not as {needs}", OTHER_CHECKPOINT)


def wrong_dtypes(name: str, dtypes: Mapping[str, str], allowed: Mapping[str, tuple[str, ...]]) -> list[Problem]:
    """Problems of stored components whose dtype (safetensors' spelling) is not among those allowed."""
    return [
        Problem(
            name,
            f"{component or 'weight'} is stored as {dtypes[component]}, and must be {' or '.join(kinds)}",
            "The checkpoint is of another method or damaged; check config.json",
        )
        for component, kinds in allowed.items()
        if component in dtypes and dtypes[component] not in kinds
    ]
