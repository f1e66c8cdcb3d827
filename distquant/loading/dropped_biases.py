"""Looks at the values of biases that a quantized checkpoint has and the model lacks: only zeros may be dropped."""

from __future__ import annotations

import numpy as np

from distquant.checkpoint import Checkpoint, TensorInfo
from distquant.errors import InputError
from distquant.loading.stream.files import Files
from distquant.parallel.comm import Comm
from distquant.planning.dropped_biases import dropped_biases
from distquant.planning.load_plan import LoadPlan

SIGNLESS = {"F16": ("<u2", 0x7FFF), "BF16": ("<u2", 0x7FFF), "F32": ("<u4", 0x7FFFFFFF)}
"""A number's bits, and those of them without its sign, so that -0.0 is a zero."""


def check_dropped_biases(plan: LoadPlan, checkpoint: Checkpoint, files: Files, comm: Comm) -> None:
    """Checks that all biases which are dropped are zero. Every rank must call it, and looks at a share; all fail alike.

    Raises:
        InputError: one is not zero.
        ReadError: its file cannot be read.
    """
    biases = dropped_biases(plan.tensors, checkpoint.tensors) if plan.prequantized else []
    if not biases:
        return
    own = [name for name in biases[comm.rank :: plan.mesh.size] if not _is_zero(files, checkpoint.tensors[name])]
    wrong = sorted(name for each in comm.collect(own) for name in each)
    if wrong:
        others = f" (nor are {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        fault = f"this bias of the checkpoint is not zero{others}, and {plan.architecture} has no such bias"
        fix = "Without it the outputs are others. Take a checkpoint without bias correction, or quantize the original"
        raise InputError.one(wrong[0], f"{fault}, so it would be dropped", fix)


def _is_zero(files: Files, info: TensorInfo) -> bool:
    """Returns True if all values of a tensor are zero."""
    data = bytearray(info.nbytes)
    files.read_run(info.file, info.offset, [memoryview(data)], [info.name])
    kind, mask = SIGNLESS.get(info.dtype, ("u1", 0xFF))
    return not bool((np.frombuffer(data, dtype=kind) & mask).any())
