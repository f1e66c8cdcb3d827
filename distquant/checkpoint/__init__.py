"""Safetensors checkpoints, read by their headers only: names, dtypes, shapes and byte ranges, never a weight byte."""

from distquant.checkpoint.checkpoint import Checkpoint, open_checkpoint
from distquant.checkpoint.faults import CheckpointError, Fault, HeaderFault
from distquant.checkpoint.headers import DTYPE_BITS, MAX_HEADER_BYTES, ShardHeader, TensorInfo, read_header

__all__ = [
    "DTYPE_BITS",
    "MAX_HEADER_BYTES",
    "Checkpoint",
    "CheckpointError",
    "Fault",
    "HeaderFault",
    "ShardHeader",
    "TensorInfo",
    "open_checkpoint",
    "read_header",
]
