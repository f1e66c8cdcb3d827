"""Tries whether Triton can compile here, before anything is read.

At its first use Triton builds a C module with the machine's own compiler, to reach the driver. Images for serving often
have none. Without this trial the error would come after the first weights are read, and name neither cause nor cure.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING

from distquant.errors import Problem, one_line

if TYPE_CHECKING:
    import torch

COMPILER = "Install a C compiler and Python's headers (apt install gcc python3-dev), or set CC to one"
REFERENCE = "kernel='reference' quantizes without Triton, slowly"

_GOOD: set[torch.device] = set()
"""Devices on which a kernel has run."""


def triton_problem(device: torch.device) -> Problem | None:
    """Returns why no Triton kernel runs on a device, and what to do; None if one has run."""
    if device in _GOOD:
        return None
    problem = failure(lambda: _smallest_kernel(device))
    if problem is None:
        _GOOD.add(device)
    return problem


def _smallest_kernel(device: torch.device) -> None:
    import torch

    from distquant.kernels import gpu

    gpu.quantize_int8_rows(torch.ones(1, 16, device=device))[0].cpu()  # the copy waits for the kernel


def failure(use: Callable[[], object]) -> Problem | None:
    """Returns the problem of a first use of Triton, from what Triton raises; None if it works."""
    from triton import TritonError

    try:
        use()
    except subprocess.CalledProcessError as error:  # its own message has the names of temporary files
        fault = f"the C compiler {error.cmd[0]} failed with exit status {error.returncode}"
        return _problem(fault, COMPILER)
    except FileNotFoundError as error:  # CC names nothing
        return _problem(f"no C compiler {error.filename!r}", COMPILER)
    except (RuntimeError, OSError, ImportError, AssertionError, TritonError) as error:
        # Triton's search for a compiler or driver, its cache, the module that it has built, its own compiler
        text = one_line(error)
        return _problem(text, COMPILER if "C compiler" in text else "See that Triton runs on this device")
    return None


def _problem(fault: str, fix: str) -> Problem:
    return Problem("kernel", f"Triton cannot compile its kernels here: {fault}", f"{fix}; {REFERENCE}")
