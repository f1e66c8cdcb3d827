"""A checkpoint and a model that planning has opened, for a load that follows at once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from distquant.checkpoint import Checkpoint, open_checkpoint
from distquant.checkpoint.sidecar_configs import CONFIG_NAME
from distquant.errors import InputError, Problems
from distquant.model import build, number_problems
from distquant.planning.load_plan import LoadPlan
from distquant.planning.request import Request, read_request


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checkpoint and its model.

    Attributes:
        checkpoint: with its headers, read a moment ago.
        model: on `meta`; it becomes the loaded model.
    """

    checkpoint: Checkpoint
    model: Any

    def fits(self, plan: LoadPlan, request: Request) -> bool:
        """Returns True if this is what was planned; it is not if rank 0 was given another request than this rank."""
        if request.trust_remote_code != plan.trust_remote_code or str(self.model.dtype) != f"torch.{plan.dtype}":
            return False
        if request.attn_implementation != plan.attn_implementation:
            return False
        return os.path.abspath(request.model) == os.path.abspath(plan.model)


def open_for_load(request: Request) -> Checkpoint:
    """Opens the checkpoint of a request; if the model needs all that its index lists, is judged later."""
    return open_checkpoint(request.model, revision=request.revision, cache_dir=request.cache_dir, incomplete=True)


def build_for_load(checkpoint: Checkpoint, dtype: str | None, options: Request | LoadPlan) -> Any:
    """Builds the model of a checkpoint on `meta`; `dtype` is None where the checkpoint decides.

    Raises:
        InputError: the configuration asks for more than the checkpoint has, or transformers cannot build it.
    """
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    numbers, file = (checkpoint.numbers, checkpoint.path.name) if checkpoint.types else (checkpoint.config, CONFIG_NAME)
    if problems := list(number_problems(numbers, shapes, file)):
        raise InputError(problems)
    return build(
        checkpoint.path,
        dtype,
        trust_remote_code=options.trust_remote_code,
        attn_implementation=options.attn_implementation,
        stored_dtype=checkpoint.dtype,
        has_head=GGUF_HEAD in checkpoint.types,
        tensors=len(shapes),
    )


GGUF_HEAD = "output.weight"
"""Name of the output head in GGUF files."""


def open_early(request: Request) -> Prepared | None:
    """Opens what a request will load, on a rank that waits for the plan; None if that must wait for the plan, too."""
    # An id is looked up by rank 0 alone: the plan has the folder that was found.
    if not isinstance(request.model, str | os.PathLike) or not os.path.exists(request.model):
        return None
    given = read_request(request, Problems())
    try:
        checkpoint = open_for_load(request)
        return Prepared(checkpoint, build_for_load(checkpoint, given.dtype, request))
    except (InputError, OSError):
        # Invalid input (also what transformers raises at it) or unreadable files. Rank 0 opens the same and reports it
        # for all, with every other problem; a fault of this rank's disk alone comes up again when the rank loads.
        # Anything else is a defect, and is raised.
        return None
