"""Products by gptqmodel's kernels of weights that are kept as GPTQ and AWQ store them.

A rank's shard of such a weight is a GPTQ or AWQ weight itself, of its own size. gptqmodel lists the kernels for it on
its device, in order (`utils/importer.py`, `select_quant_linear`; facts of version 7.6.0). The first that takes the
shard is filled with its words and tried on a few rows. A kernel that does not give the product of the dequantized
weight is passed over, so that none changes a model by reading a weight in another way than it is meant.

Kernels of two kinds:

- TritonV2Linear, AwqGEMMLinear and AwqGEMMTritonLinear multiply the words as they are stored, as do TorchLinear and
  AwqTorchLinear, which are not faster than what is here. The kernel then uses the module's own tensors, and nothing is
  lost: gradients, state dict and fingerprint are of the stored words.
- Marlin, Machete and others, and the ATen kernels on a CPU, rearrange the words, which cannot be undone. The module
  releases its own, after its part of the fingerprint was counted.

The words that a kernel holds after its trial show its kind. The stored zero points decide whether a weight is
symmetric: Marlin takes the midpoint for them and does not read what is stored.

Left out on purpose: ExLlama's kernels, whose scratch memory belongs to a whole model (`gptqmodel_post_init`), and the
fused Torch ones, which change options of torch's compiler and take the midpoint for every zero point on a CPU
(`torch_fused.py`, `transform_cpu`). A row-parallel shard of an act-order weight has parts of all groups, and kernels
need whole ones; it is dequantized.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from distquant.config import torch_dtype
from distquant.errors import one_line
from distquant.process_state import changing_process_state
from distquant.quantization.algorithms.bit_packing import pack_words
from distquant.quantization.linear.quantized_linear import QuantizedLinear
from distquant.quantization.packed_int import PackedIntScheme
from distquant.sharding.layout import ALL
from distquant.sharding.shard import Shard
from distquant.sharding.tally import Tally

MINIMUM_VERSION = "7.6.0"
"""The version whose sources the facts here are from; it runs with torch 2.13."""

LEFT_OUT = frozenset({"gptq_exllama_v2", "awq_exllama_v2", "gptq_torch_fused", "awq_torch_fused"})
"""Backends, by gptqmodel's names."""

DEQUANTIZING = frozenset({"gptq_torch", "awq_torch"})
"""Backends that dequantize and multiply in torch, as `QuantizedLinear` does by itself: only taken where asked for."""

NONE = "none of its kernels is for such a weight there"

FORMATS = {"gptq": ("gptq", "gptq"), "gptq_v2": ("gptq", "gptq_v2"), "awq": ("awq", "gemm")}
"""gptqmodel's method and format, by the kind of packing."""

TRIAL_ROWS = 8
"""Rows of inputs on which a kernel is tried."""

TOLERANCE = 0.01
"""Largest relative error of that product (Frobenius norm): kernels in bfloat16 have up to 0.004, and zero points wrong
by one give 0.014 at least (of 8 bits and random zero points, with one group in a row)."""


@dataclass(slots=True)
class GptqmodelKernel:
    """One of gptqmodel's modules, filled with a shard's words.

    It is not a submodule: it holds the module's own tensors, or nothing that a state dict should have.
    """

    linear: Any
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        return f"gptqmodel's {type(self.linear).__name__}"

    def __call__(self, x: Tensor) -> Tensor:
        """`x @ W.T` in the dtype of `x`, `[..., out]` from `[..., in]`, computed in the dtype of the model."""
        product = self.linear(x.to(self.dtype))
        if product.is_inference() and not torch.is_inference_mode_enabled():
            product = product.clone()  # AwqGEMMLinear's; autograd takes no such tensor
        return product.to(x.dtype)


@cache
def missing() -> str | None:
    """Reason why gptqmodel cannot be used here; None where it can. Importing it takes seconds."""
    try:
        installed = importlib.metadata.version("gptqmodel")
        if Version(installed) < Version(MINIMUM_VERSION):
            return f"gptqmodel {installed}, {MINIMUM_VERSION} or newer is needed"
        with _prints_to_stderr():
            importlib.import_module("gptqmodel.utils.importer")
            # It logs three lines of candidates for each module of a model; the report names the one that is used.
            importlib.import_module("gptqmodel.utils.logger").setup_logger().setLevel("WARNING")
    except importlib.metadata.PackageNotFoundError:
        return "gptqmodel is not installed"
    except Exception as error:  # it imports half of the ecosystem, and the reason keeps its words
        return f"gptqmodel cannot be imported ({one_line(error)})"
    return None


def why_not(scheme: PackedIntScheme, shard: Shard, device: torch.device, keep: bool) -> str | None:
    """Reason why there is no kernel for a shard, by its config and shape; None where there may be one.

    Args:
        scheme: of the weight.
        shard: this rank's part, or another's.
        device: where it will be stored.
        keep: True if the words must stay as they are stored.
    """
    if (reason := _unfit(scheme, shard)) is not None:
        return reason
    symmetric = scheme.packing(shard.name).grid.symmetric
    reasons = [reason for _, reason in _kinds(scheme, shard, device, symmetric, keep)]
    return None if None in reasons else "; ".join(map(str, reasons)) or NONE


def _unfit(scheme: PackedIntScheme, shard: Shard) -> str | None:
    """Reason why no kernel takes a shard, on any device; None where one may."""
    packing, dtype = scheme.packing(shard.name), torch_dtype(shard.dtype)
    if dtype not in (torch.float16, torch.bfloat16):
        return f"gptqmodel's kernels multiply in float16 or bfloat16, and the model is loaded as {shard.dtype}"
    if packing.reordered and shard.local_shape[1] != shard.shape[1]:
        return "inputs are split and in the order of their activations, so that groups are in parts"
    group = packing.group(shard.shape[1])
    if group != ALL and shard.local_shape[1] % group:
        return f"{shard.local_shape[1]} inputs are not a multiple of the group size {group}"
    return None


def take_kernel(module: QuantizedLinear, keep: bool) -> str | None:
    """Gives a module the first kernel that multiplies its weight; returns the reason where there is none.

    Args:
        module: of a `PackedIntScheme`, filled, on its device.
        keep: True if the words must stay as they are stored.
    """
    scheme, shard, words = module.scheme, module.shard, module.components
    assert isinstance(scheme, PackedIntScheme)
    device = words["qweight"].device
    if (reason := _unfit(scheme, shard)) is not None:
        return reason
    packing = scheme.packing(shard.name)
    zeros = packing.unpack_zeros(words["qzeros"], torch.uint8)
    symmetric = bool((zeros == 1 << packing.bits - 1).all())
    reasons = []
    for kind, refusal in _kinds(scheme, shard, device, symmetric, keep):
        try:
            reason = refusal or _try_kernel(kind, module, words, zeros, symmetric, keep)
        except Exception as error:  # kernels fail in ways of their own: no compiler, no library
            reason = f"{kind.__name__}: {one_line(error)}"
        if reason is None:
            return None
        reasons.append(reason)
    return "; ".join(reasons) or NONE


def _try_kernel(
    kind: Any, module: QuantizedLinear, words: Mapping[str, Tensor], zeros: Tensor, symmetric: bool, keep: bool
) -> str | None:
    """Fills and tries a kernel; the module has it where None is returned."""
    shard, dtype, device = module.shard, torch_dtype(module.shard.dtype), words["qweight"].device
    with _prints_to_stderr(), torch.no_grad():
        linear = _filled(kind, module, words, zeros, symmetric)
        kernel = GptqmodelKernel(linear, dtype, device)
        x = torch.rand(TRIAL_ROWS, shard.local_shape[1], generator=torch.Generator().manual_seed(0)).to(device, dtype)
        product = kernel(x).float()
    expected = nn.functional.linear(x, module.dequantized().to(dtype)).float()
    error = float((product - expected).norm() / expected.norm())
    if not error <= TOLERANCE:
        return f"{kind.__name__}: its product differs from that of the dequantized weight by more than {TOLERANCE:.0%}"
    if not _shares(linear, words):
        if keep:
            return f"{kind.__name__}: it rearranges the stored words"
        assert isinstance(module.scheme, PackedIntScheme)
        tally = Tally(shard.name)
        module.scheme.tally(module, shard, tally)
        module.give(tally.lanes)
    module.kernel = kernel
    return None


def _kinds(
    scheme: PackedIntScheme, shard: Shard, device: torch.device, symmetric: bool, keep: bool
) -> Iterator[tuple[Any, str | None]]:
    """Kernels for a shard, the fastest first, each with the reason why it cannot be."""
    from gptqmodel.utils.backend import BACKEND
    from gptqmodel.utils.importer import select_quant_linear

    packing = scheme.packing(shard.name)
    method, form = FORMATS[packing.kind]
    arguments = _arguments(scheme, shard, symmetric)
    # On a GPU, kernels for training leave the words as they are stored; on a CPU only the trial shows it.
    backend, left_out = (BACKEND.AUTO_TRAINABLE, LEFT_OUT | DEQUANTIZING) if keep else (BACKEND.AUTO, LEFT_OUT)
    try:
        with _prints_to_stderr():
            kinds = select_quant_linear(
                **arguments, device=device, backend=backend, format=form, quant_method=method, multi_select=True
            )
    except (ValueError, NotImplementedError) as error:
        yield None, one_line(error)
        return
    for kind in kinds:
        if left_out.isdisjoint(each.value for each in kind.SUPPORTS_BACKENDS):
            rows, columns = shard.local_shape
            valid, reason = kind.validate(**arguments, in_features=columns, out_features=rows, device=device)
            yield kind, None if valid else f"{kind.__name__}: {one_line(reason)}"


def _arguments(scheme: PackedIntScheme, shard: Shard, symmetric: bool) -> dict[str, Any]:
    """Arguments by which gptqmodel knows a weight, under its names."""
    packing = scheme.packing(shard.name)
    group = packing.group(shard.shape[1])
    return {
        "bits": packing.bits,
        "group_size": -1 if group == ALL else group,
        "desc_act": packing.reordered,
        "sym": symmetric,
        "pack_dtype": torch.int32,
        "dtype": torch_dtype(shard.dtype),
    }


def _filled(
    kind: Any, module: QuantizedLinear, words: Mapping[str, Tensor], zeros: Tensor, symmetric: bool
) -> nn.Module:
    """Makes a kernel with copies of the words: it may write to its tensors."""
    scheme, shard = module.scheme, module.shard
    assert isinstance(scheme, PackedIntScheme)
    packing, (rows, columns) = scheme.packing(shard.name), shard.local_shape
    with torch.device("meta"):
        arguments = _arguments(scheme, shard, symmetric)
        linear = kind(**arguments, in_features=columns, out_features=rows, bias=False, register_buffers=True)
    copies = {name: value.clone() for name, value in words.items()}
    if copies["scales"].dtype == torch.float32:
        copies["scales"] = copies["scales"].to(torch_dtype(shard.dtype))
    if packing.kind == "gptq" and kind.REQUIRES_FORMAT_V2:  # zero points as they are, not less one
        copies["qzeros"] = pack_words(zeros, packing.bits, 1)
    if packing.kind != "awq" and not packing.index:
        copies["g_idx"] = torch.arange(columns, dtype=torch.int32, device=zeros.device) // (columns // len(zeros))
    linear.load_state_dict(copies, assign=True)
    if packing.kind != "awq" and kind.REQUIRES_FORMAT_V2:
        linear.qzero_format(2)
    linear.eval().requires_grad_(False)
    linear.post_init()
    return linear


def _shares(linear: Any, words: Mapping[str, Tensor]) -> bool:
    """Returns True if a kernel has left the codes as they are stored; it then gives up its copies for these tensors."""
    if not _same(getattr(linear, "qweight", None), words["qweight"]):
        return False
    for name, value in words.items():
        if _same(getattr(linear, name, None), value):
            getattr(linear, name).data = value
    return True


def _same(held: Any, stored: Tensor) -> bool:
    return isinstance(held, Tensor) and held.dtype == stored.dtype and torch.equal(held, stored)


@contextlib.contextmanager
def _prints_to_stderr() -> Iterator[None]:
    """Sends what gptqmodel prints to where logs go: standard output is for the command's own result."""
    with changing_process_state(), contextlib.redirect_stdout(sys.stderr):
        yield
