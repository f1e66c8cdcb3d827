"""Parameters that a checkpoint seems to lack: where their tensors are instead, and what to do about it.

A cause is one problem, however many parameters have it. In this order: the tensors have other names; the index does not
list them, or was not read; they are stored in another form; one of two tied tensors is there. What is left is missing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from distquant.errors import Problem
from distquant.model import STAR, ModelDescription
from distquant.planning.described import Described

DOWNLOAD = "Download the checkpoint again, or check that config.json belongs to it"

LISTED = 3
"""Further parameters that a message names."""

COMPONENTS = re.compile(
    r"(qweight|qzeros|scales|g_idx|weight_packed|weight_shape|weight_scale\w*|weight_zero_point|weight_blocks|weight_scales"
    r"|W_q|_data|_scale|SCB|q_weight|q_invperm|oweight|indices|centroids|codes|codebooks|Qidxs|trellis|qweight_type)"
)
"""Last part of a name under which a quantized weight, or what belongs to it, is stored."""


def missing_problems(described: Described, missing: Sequence[str]) -> Iterator[Problem]:
    """Yields the problems of parameters without tensors, one for each cause."""
    description, left = described.description, list(missing)
    for cause in described.elsewhere:
        found = [name for name in left if _covers(description, cause.tensors, name)]
        if found:
            yield cause.problem(found)
            left = [name for name in left if name not in set(found)]
    for find in (_in_other_form, _untied):
        problem, found = find(described, left)
        if problem is not None:
            yield problem
            left = [name for name in left if name not in set(found)]
    if left:
        first, *others = left
        fault = f"the checkpoint has no tensor for it (shape {list(shape_of(description, first))})"
        if others:
            names = ", ".join(others[:LISTED]) + (", ..." if len(others) > LISTED else "")
            fault += f", nor for {len(others):,} more parameters ({names})"
        yield Problem(first, fault, DOWNLOAD)


def _covers(description: ModelDescription, targets: Collection[str], name: str) -> bool:
    """Returns True if a parameter is among these, or one expert's in a module of which all experts are one of these."""
    if name in targets:
        return True
    module = next((module for module in description.experts if name.startswith(f"{module}.")), None)
    return module is not None and any(target.startswith(f"{module}.") for target in targets)


def shape_of(description: ModelDescription, name: str) -> tuple[int, ...]:
    """Returns the shape of a parameter, which may be one expert's."""
    if name in description.params:
        return description.params[name].shape
    return description.params[re.sub(r"\.\d+(\.[^.]+\.[^.]+)$", rf".{STAR}\1", name)].shape[1:]


# -- other forms -------------------------------------------------------------------------------------------------------


def _in_other_form(described: Described, missing: Sequence[str]) -> tuple[Problem | None, list[str]]:
    """Returns the problem of weights that are stored as components which the method does not have."""
    stored: dict[str, set[str]] = {}
    for name in described.description.unexpected:
        module, _, leaf = name.rpartition(".")
        if COMPONENTS.fullmatch(leaf):
            stored.setdefault(module, set()).add(leaf)
    tensors = {name: stored[module] for name in missing if (module := name.removesuffix(".weight")) in stored}
    if not tensors:
        return None, []
    kinds = ", ".join(sorted({leaf for leaves in tensors.values() for leaf in leaves}))
    weights = "a weight is" if len(tensors) == 1 else f"{len(tensors):,} weights are"
    if described.prequantized:
        fault = f"{weights} stored as {kinds}, and not as {described.scheme.config.quant_method!r} stores them"
        fix = "The quantization_config is of another checkpoint: put this one's into config.json"
    else:
        fault = f"{weights} stored quantized ({kinds}), and config.json has no quantization_config"
        fix = "Put the checkpoint's quantization_config into config.json, or its quantize_config.json beside it"
    return Problem(next(iter(tensors)), fault, fix), list(tensors)


def _untied(described: Described, missing: Sequence[str]) -> tuple[Problem | None, list[str]]:
    """Returns the problem of an output head, or an embedding, without a tensor while the other of the two has one."""
    description = described.description
    head, embedding = (f"{each}.weight" for each in (description.output_embedding, description.input_embedding))
    for name, other in ((head, embedding), (embedding, head)):
        if name in missing and description.sources.get(other):
            fault = f"the checkpoint has no tensor for it, but one for {other}, and config.json does not tie the two"
            fix = 'If the model has one weight for both, set "tie_word_embeddings": true in config.json'
            return Problem(name, fault, f"{fix}; else download the checkpoint again"), [name]
    return None, []
