"""distquant: a distributed multi-GPU model loader with sharding-aware quantization.

    import distquant as dq
    model = dq.load("path-or-cached-id", "nf4")                                        # in this process
    plan = dq.plan("path-or-cached-id", "nf4-dq", tp=8, max_memory="24GiB")            # for 8 GPUs, on any machine
    model = dq.load("path-or-cached-id", "nf4-dq", tp=8)                               # in each of 8 ranks

Ids are looked up in the local Hugging Face cache: nothing is downloaded. Importing distquant imports neither torch nor
Ray and uses no GPU; names are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distquant.errors import CheckFailed, DistquantError, InputError, Problem, RankError
from distquant.version import __version__

if TYPE_CHECKING:
    from distquant.api import fingerprint, from_pretrained, load, plan
    from distquant.cli.functions import doctor, inspect, save, verify
    from distquant.planning import LoadPlan
    from distquant.runtime import ray as ray
    from distquant.verification.perplexity import perplexity

_LAZY = {
    "LoadPlan": "distquant.planning",
    "doctor": "distquant.cli.functions",
    "fingerprint": "distquant.api",
    "from_pretrained": "distquant.api",
    "inspect": "distquant.cli.functions",
    "load": "distquant.api",
    "perplexity": "distquant.verification.perplexity",
    "plan": "distquant.api",
    "save": "distquant.cli.functions",
    "verify": "distquant.cli.functions",
}

__all__ = [
    "CheckFailed",
    "DistquantError",
    "InputError",
    "LoadPlan",
    "Problem",
    "RankError",
    "__version__",
    "doctor",
    "fingerprint",
    "from_pretrained",
    "inspect",
    "load",
    "perplexity",
    "plan",
    "ray",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name == "ray":
        return importlib.import_module("distquant.runtime.ray")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Returns the names of the API, as `__all__` has them; without `ray` where Ray is not installed."""
    from importlib.util import find_spec

    return [name for name in __all__ if name != "ray" or find_spec("ray") is not None]
