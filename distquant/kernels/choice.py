"""Chooses the kernels that quantize on a device: once, with a reason that reports show."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from distquant.accelerator.names import runs_cuda_kernels
from distquant.errors import InputError

if TYPE_CHECKING:
    import torch

    from distquant.kernels.protocol import Kernels


class Kernel(str, Enum):
    """Kernels that a user may ask for."""

    AUTO = "auto"
    """The fastest exact kernels of the device: `cpu` on the CPU, `triton` on CUDA."""
    REFERENCE = "reference"
    """Plain torch, on any device."""
    CPU = "cpu"
    """Native code, on the CPU."""
    TRITON = "triton"
    """Triton, on CUDA (on the CPU in Triton's interpreter, `TRITON_INTERPRET=1`)."""
    BITSANDBYTES = "bitsandbytes"
    """The library bitsandbytes, for the formats that it has; on CUDA its FP4 decides otherwise at the thresholds."""


@dataclass(frozen=True)
class Choice:
    """The kernels for one device.

    Attributes:
        kernel: never AUTO.
        ops: the module of kernels.
        reason: one line for people, `cpu: AVX-512, 1 thread`.
    """

    kernel: Kernel
    ops: Kernels
    reason: str


ISA_NAMES = {"portable": "no AVX2", "avx2": "AVX2", "avx512": "AVX-512"}


def choose(kernel: Kernel | str, device: torch.device) -> Choice:
    """Returns the kernels that `kernel` asks for on `device`.

    Raises:
        InputError: the name is unknown, or these kernels cannot run there. On the CPU `auto` takes the reference if the
            native kernels are missing, as `reason` shows; on CUDA it needs Triton.
    """
    try:
        wanted = Kernel(kernel)
    except ValueError:
        names = ", ".join(member.value for member in Kernel)
        raise InputError.one("kernel", f"unknown kernels {kernel!r}", f"Take one of {names}") from None
    if wanted is Kernel.AUTO:
        return _automatic(device)
    if wanted is Kernel.REFERENCE:
        return _reference(f"reference: plain torch on {device}")
    make = {Kernel.CPU: _cpu, Kernel.TRITON: _triton, Kernel.BITSANDBYTES: _bitsandbytes}
    return make[wanted](device)


def _automatic(device: torch.device) -> Choice:
    if runs_cuda_kernels(device):
        return _triton(device)
    if device.type != "cpu":
        return _reference(f"reference: plain torch, no other kernels run on {device}")
    try:
        return _cpu(device)
    except InputError as error:
        if isinstance(error.__cause__, ImportError):
            return _reference(f"reference: plain torch, slow, because {error.__cause__}")
        raise


def _reference(reason: str) -> Choice:
    from distquant.kernels import reference

    return Choice(Kernel.REFERENCE, reference, reason)


def _cpu(device: torch.device) -> Choice:
    import torch

    if device.type != "cpu":
        raise InputError.one("kernel", f"'cpu' cannot quantize on {device}", "Take 'auto', 'triton' or 'reference'")
    try:
        from distquant.kernels import cpu
    except ImportError as error:
        fix = "Install distquant where a C++17 compiler is found, or take 'reference'"
        raise InputError.one("kernel", f"'cpu' is not available: {error}", fix) from error
    threads = torch.get_num_threads()
    reason = f"cpu: {ISA_NAMES[cpu.isa()]}, {threads} thread{'s' if threads > 1 else ''}"
    return Choice(Kernel.CPU, cpu, reason)


def _triton(device: torch.device) -> Choice:
    try:
        import triton

        from distquant.accelerator.facts import device_label
        from distquant.kernels import gpu
    except ImportError as error:
        fix = "Install the triton that belongs to this torch, or take 'reference'"
        raise InputError.one("kernel", f"'triton' is not available: {error}", fix) from error
    if runs_cuda_kernels(device):
        return Choice(Kernel.TRITON, gpu, f"triton: {device_label(device)}, Triton {triton.__version__}")
    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return Choice(Kernel.TRITON, gpu, f"triton: interpreted on the CPU, very slow, Triton {triton.__version__}")
    raise InputError.one("kernel", f"'triton' cannot quantize on {device}", "Take 'auto', 'cpu' or 'reference'")


def _bitsandbytes(device: torch.device) -> Choice:
    if device.type != "cpu" and not runs_cuda_kernels(device):
        raise InputError.one("kernel", f"'bitsandbytes' cannot quantize on {device}", "Take 'reference'")
    try:
        import bitsandbytes

        from distquant.kernels import with_bitsandbytes
    except ImportError as error:
        fix = "pip install 'distquant[bitsandbytes]', or take 'auto'"
        raise InputError.one("kernel", f"'bitsandbytes' is not available: {error}", fix) from error
    reason = f"bitsandbytes: version {bitsandbytes.__version__} on {device}"
    return Choice(Kernel.BITSANDBYTES, with_bitsandbytes, reason)
