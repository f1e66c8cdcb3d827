"""Registers host memory with a device, so that copies are asynchronous and fast ("pinned" memory).

torch pins only memory that it allocates itself. The load buffer is memory that the ranks of a node share, so it must be
registered where it lies: by `cudaHostRegister`, which torch hands out as `torch.cuda.cudart()` (with ROCm that is
`hipHostRegister` under the same name). Other backends have nothing like it in torch, and their copies go on unpinned.

A failed call leaves its error behind, and the next launch of any kernel would raise it as if it were its own. So it is
cleared where it is made.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import torch
from torch import Tensor

TRIAL = 64 << 20
"""Bytes that `trial` registers: as many as a load buffer has."""

LAST_ERROR = ("cudaGetLastError", "hipGetLastError")
"""Functions of the runtimes that return the error that is left behind, and clear it."""


class HostRegistration:
    """Host memory that is registered with a device, as far as that worked.

    Attributes:
        failure: why copies from this memory are not asynchronous; "" = they are.
    """

    def __init__(self, memory: Tensor, device: torch.device):
        self.failure = ""
        self._address, self._device = memory.data_ptr(), device
        self._runtime = _runtime(device)
        if self._runtime is None:
            self.failure = f"torch registers no host memory with {device.type} devices"
            return
        with torch.accelerator.device_index(device.index):
            code = int(self._runtime.cudaHostRegister(self._address, memory.nbytes, 0))
            if code != 0:
                _clear_error(self._runtime, device)
                self.failure = f"{device} did not register host memory ({_words(self._runtime, code)})"
                self._runtime = None

    @property
    def pinned(self) -> bool:
        """True if copies from this memory are asynchronous."""
        return not self.failure

    def release(self) -> None:
        """Ends the registration; the memory must not be given back before. Does nothing a second time."""
        runtime, self._runtime = self._runtime, None
        if runtime is not None and int(runtime.cudaHostUnregister(self._address)) != 0:
            _clear_error(runtime, self._device)


def trial(device: torch.device) -> str:
    """Returns why shared host memory of a load buffer's size cannot be registered with a device; "" = it can be."""
    with mmap.mmap(-1, TRIAL) as area:
        memory = torch.frombuffer(area, dtype=torch.uint8)
        registration = HostRegistration(memory, device)
        registration.release()
        del memory  # a mapping is closed only when nothing refers to it
    return registration.failure


def _runtime(device: torch.device) -> Any:
    """Returns the backend's runtime if it can register memory, else None."""
    make = getattr(torch.get_device_module(device), "cudart", None)
    return None if make is None else make()


def _words(runtime: Any, code: int) -> str:
    """Returns the runtime's number of an error, and its own words where it has some."""
    describe, kind = getattr(runtime, "cudaGetErrorString", None), getattr(runtime, "cudaError", None)
    return f"error {code}" if describe is None or kind is None else f"error {code}: {describe(kind(code))}"


def _clear_error(runtime: Any, device: torch.device) -> None:
    """Takes the error that a failed call has left behind."""
    # torch's own binding of the runtime lacks this function. The runtime's library is among the symbols of the process,
    # because torch loads the libraries that it depends on with RTLD_GLOBAL.
    process = ctypes.CDLL(None)
    for name in LAST_ERROR:
        if (take := getattr(runtime, name, None) or getattr(process, name, None)) is not None:
            take()
            return
    try:
        torch.zeros(1, device=device)  # torch asks for errors after a launch: this one gets ours, and with it clears it
    except RuntimeError:
        return
