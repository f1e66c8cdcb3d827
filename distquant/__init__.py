"""distquant: a distributed multi-GPU model loader with sharding-aware quantization.

    import distquant as dq
    plan = dq.plan("path-or-hub-id", quantization_config="nf4-dq", mesh="tp=8", max_memory="24GiB")
    model = dq.load("path-or-hub-id", quantization_config="nf4-dq", mesh="tp=8")

Importing it imports neither torch nor Ray and uses no GPU; names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from distquant.errors import CheckFailed, DistquantError, InputError, Problem, RankError
from distquant.version import __version__

if TYPE_CHECKING:
    from distquant.api import fingerprint, load, plan
    from distquant.planning import LoadPlan
    from distquant.runtime import ray as ray
    from distquant.verification.perplexity import perplexity

_LAZY = {
    "LoadPlan": "distquant.planning",
    "fingerprint": "distquant.api",
    "load": "distquant.api",
    "perplexity": "distquant.verification.perplexity",
    "plan": "distquant.api",
}

__all__ = [
    "CheckFailed",
    "DistquantError",
    "InputError",
    "LoadPlan",
    "Problem",
    "RankError",
    "__version__",
    "fingerprint",
    "load",
    "perplexity",
    "plan",
    "ray",
]


def __getattr__(name: str) -> Any:
    if name == "ray":
        return importlib.import_module("distquant.runtime.ray")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
