"""What each method needs to run in transformers: packages, compute capability, and whether a CPU will do.

The facts are those of transformers 5.23: `quantizers/quantizer_<method>.py`, `validate_environment`, and the versions
in `utils/import_utils.py` and `quantizer_gptq.py`. `reference` says what plain torch can do here instead, on any
device: a layout and its arithmetic are no secret, kernels only make them fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Reference = Literal["all", "load", "none"]
"""Quantize and load in plain torch; only load what is quantized already; neither."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Requirements:
    """What transformers asks for before it loads with one method."""

    packages: Mapping[str, str] = field(default_factory=dict)
    """Package -> least version; "0" = any. Most need `accelerate` as well, which is not repeated."""
    below: Mapping[str, str] = field(default_factory=dict)
    """Package -> version that is too new."""
    capability: tuple[int, int] | None = None
    """Least compute capability of a CUDA device; None = any."""
    cpu: bool
    """Whether transformers runs the method on a CPU, without dequantizing it."""
    quantizes: bool = True
    """Whether transformers quantizes an unquantized checkpoint; otherwise it only loads quantized ones."""
    reference: Reference
    """What plain torch can do here."""
    note: str = ""
    """What else to know."""


_KERNELS: Mapping[str, str] = {"kernels": "0.18.2"}
_KERNELS_BELOW: Mapping[str, str] = {"kernels": "0.19.0"}

REQUIREMENTS: Mapping[str, Requirements] = {
    "none": Requirements(cpu=True, reference="all"),
    "bitsandbytes": Requirements(packages={"bitsandbytes": "0.46.1"}, cpu=True, reference="all"),
    "gptq": Requirements(
        packages={"gptqmodel": "1.4.3", "optimum": "1.24.0"},
        cpu=True,
        reference="all",
        note="quantizing needs a data set; plain torch rounds to nearest",
    ),
    "awq": Requirements(packages={"gptqmodel": "0"}, cpu=True, quantizes=False, reference="all"),
    "auto-round": Requirements(packages={"auto-round": "0.5.0"}, cpu=True, quantizes=False, reference="load"),
    "fp8": Requirements(
        capability=(8, 9),
        cpu=False,
        reference="all",
        note="transformers loads quantized checkpoints as bfloat16 where there is no such GPU",
    ),
    "mxfp8": Requirements(
        capability=(8, 9),
        cpu=False,
        reference="all",
        note="transformers loads quantized checkpoints as bfloat16 where there is no such GPU",
    ),
    "fbgemm_fp8": Requirements(packages={"fbgemm-gpu": "0"}, capability=(9, 0), cpu=False, reference="all"),
    "compressed-tensors": Requirements(
        packages={"compressed-tensors": "0.15.0"},
        cpu=True,
        quantizes=False,
        reference="all",
        note="kernels for quantized FP8 need capability 8.9",
    ),
    "torchao": Requirements(
        packages={"torchao": "0.15.0"}, cpu=True, reference="all", note="int4 needs kernels of its own on a GPU"
    ),
    "hqq": Requirements(
        packages={"hqq": "0.2.1"},
        cpu=False,
        quantizes=False,
        reference="all",
        note="a device map with cpu or disk is refused",
    ),
    "quanto": Requirements(packages={"optimum-quanto": "0"}, cpu=True, reference="all"),
    "gguf": Requirements(
        packages={"gguf": "0.10.0"},
        cpu=True,
        quantizes=False,
        reference="load",
        note="without kernels for the device transformers loads the whole file dequantized",
    ),
    "mxfp4": Requirements(
        packages={"triton": "3.4.0", **_KERNELS},
        below=_KERNELS_BELOW,
        capability=(7, 5),
        cpu=True,
        reference="all",
        note="on CPU triton 3.5.0; transformers loads quantized checkpoints as bfloat16 where something is missing",
    ),
    "nvfp4": Requirements(
        packages=_KERNELS,
        below=_KERNELS_BELOW,
        capability=(10, 0),
        cpu=False,
        reference="all",
        note="one device, and no quantized checkpoints",
    ),
    "eetq": Requirements(packages=_KERNELS, below=_KERNELS_BELOW, cpu=False, reference="none"),
    "bitnet": Requirements(
        cpu=True, quantizes=False, reference="load", note="a device map with cpu or disk beside a GPU is refused"
    ),
    "aqlm": Requirements(packages={"aqlm": "0"}, cpu=True, quantizes=False, reference="none"),
    "vptq": Requirements(packages={"vptq": "0.0.4"}, cpu=False, quantizes=False, reference="none"),
    "spqr": Requirements(packages={"spqr_quant": "0"}, cpu=False, quantizes=False, reference="none"),
    "higgs": Requirements(
        packages={"flute-kernel": "0.4.1", "fast_hadamard_transform": "0"},
        cpu=False,
        quantizes=False,
        reference="none",
        note="a device map with cpu or disk is refused",
    ),
    "fp_quant": Requirements(
        packages={"fp_quant": "0.3.2", "qutlass": "0.2.0"},
        capability=(10, 0),
        cpu=False,
        reference="none",
        note="with pseudoquantization qutlass is not needed, and capability 9.0 will do (mxfp4: any)",
    ),
    "fouroversix": Requirements(packages={"fouroversix": "0"}, cpu=True, reference="none"),
    "quark": Requirements(packages={"amd-quark": "0.12"}, cpu=True, quantizes=False, reference="none"),
    "sinq": Requirements(packages={"sinq": "0"}, cpu=True, reference="none", note="one device"),
    "metal": Requirements(
        packages=_KERNELS,
        below=_KERNELS_BELOW,
        cpu=False,
        reference="load",
        note="Apple's GPUs; elsewhere transformers loads quantized checkpoints as bfloat16",
    ),
    "gemma": Requirements(cpu=True, quantizes=False, reference="none"),
}
"""Requirements by `quant_method`."""
