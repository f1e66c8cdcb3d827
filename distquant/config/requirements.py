"""Requirements of the methods that transformers loads: packages, compute capability, and support of CPUs.

The facts are those of transformers 5.23: `quantizers/quantizer_<method>.py`, `validate_environment`, and the versions
in `utils/import_utils.py`. Methods that are loaded here have their requirements in their schemes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Requirements:
    """The requirements of transformers for loading with one method."""

    packages: Mapping[str, str] = field(default_factory=dict)
    """Package -> least version; "0" = any. Most need `accelerate` as well, which is not repeated."""
    below: Mapping[str, str] = field(default_factory=dict)
    """Package -> version that is too new."""
    capability: tuple[int, int] | None = None
    """Least compute capability of a CUDA device; None = any."""
    cpu: bool
    """True if transformers runs the method on a CPU without dequantizing it."""
    quantizes: bool = True
    """True if transformers quantizes an unquantized checkpoint; otherwise it only loads quantized ones."""
    note: str = ""
    """Further conditions, for messages."""


_KERNELS: Mapping[str, str] = {"kernels": "0.18.2"}
_KERNELS_BELOW: Mapping[str, str] = {"kernels": "0.19.0"}

REQUIREMENTS: Mapping[str, Requirements] = {
    "nvfp4": Requirements(
        packages=_KERNELS,
        below=_KERNELS_BELOW,
        capability=(10, 0),
        cpu=False,
        note="one device, and no quantized checkpoints",
    ),
    "eetq": Requirements(packages=_KERNELS, below=_KERNELS_BELOW, cpu=False),
    "bitnet": Requirements(cpu=True, quantizes=False, note="a device map with cpu or disk beside a GPU is refused"),
    "aqlm": Requirements(packages={"aqlm": "0"}, cpu=True, quantizes=False),
    "vptq": Requirements(packages={"vptq": "0.0.4"}, cpu=False, quantizes=False),
    "spqr": Requirements(packages={"spqr_quant": "0"}, cpu=False, quantizes=False),
    "higgs": Requirements(
        packages={"flute-kernel": "0.4.1", "fast_hadamard_transform": "0"},
        cpu=False,
        quantizes=False,
        note="a device map with cpu or disk is refused",
    ),
    "fp_quant": Requirements(
        packages={"fp_quant": "0.3.2", "qutlass": "0.2.0"},
        capability=(10, 0),
        cpu=False,
        note="with pseudoquantization qutlass is not needed, and capability 9.0 will do (mxfp4: any)",
    ),
    "fouroversix": Requirements(packages={"fouroversix": "0"}, cpu=True),
    "quark": Requirements(packages={"amd-quark": "0.12"}, cpu=True, quantizes=False),
    "sinq": Requirements(packages={"sinq": "0"}, cpu=True, note="one device"),
    "metal": Requirements(
        packages=_KERNELS,
        below=_KERNELS_BELOW,
        cpu=False,
        note="Apple's GPUs; elsewhere transformers loads quantized checkpoints as bfloat16",
    ),
    "gemma": Requirements(cpu=True, quantizes=False),
}
"""Requirements by `quant_method`, of the methods that are delegated to transformers."""
