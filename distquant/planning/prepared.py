"""What has been opened and built for planning, and need not be for the load that follows at once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distquant.checkpoint import Checkpoint, open_checkpoint
from distquant.errors import Problems
from distquant.model import build
from distquant.planning.load_plan import LoadPlan
from distquant.planning.request import Request, read_request


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checkpoint and its model.

    Attributes:
        checkpoint: its headers, read a moment ago.
        model: on `meta`; it becomes the loaded model.
    """

    checkpoint: Checkpoint
    model: Any

    def fits(self, plan: LoadPlan, request: Request) -> bool:
        """Whether this is what was planned: another rank's request was taken for it."""
        if request.trust_remote_code != plan.trust_remote_code or str(self.model.dtype) != f"torch.{plan.dtype}":
            return False
        return os.path.abspath(request.model) == os.path.abspath(plan.model)


def open_early(request: Request) -> Prepared | None:
    """What a request will load, for a rank that waits for the plan; None where it must wait.

    Nothing is told here: rank 0 opens and builds the same and tells what is wrong, and what fails on this rank alone
    fails again when it loads.
    """
    if not isinstance(request.model, str | os.PathLike) or not os.path.exists(request.model):
        return None
    given = read_request(request, Problems())
    try:
        model = build(Path(request.model), given.dtype, trust_remote_code=request.trust_remote_code)
        return Prepared(open_checkpoint(request.model, revision=request.revision), model)
    except Exception:
        return None
