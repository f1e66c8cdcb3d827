"""Safetensors checkpoints, read by their headers only: names, dtypes, shapes and byte ranges, never a weight byte."""

from distquant.checkpoint.checkpoint import Checkpoint, open_checkpoint
from distquant.checkpoint.faults import CheckpointError, Fault, HeaderFault
from distquant.checkpoint.folders import ADAPTER_CONFIG, SINGLE_NAME
from distquant.checkpoint.headers import DTYPE_BITS, MAX_HEADER_BYTES, ShardHeader, TensorInfo, read_header
from distquant.checkpoint.index import INDEX_NAME

__all__ = [
    "ADAPTER_CONFIG",
    "DTYPE_BITS",
    "INDEX_NAME",
    "MAX_HEADER_BYTES",
    "SINGLE_NAME",
    "Checkpoint",
    "CheckpointError",
    "Fault",
    "HeaderFault",
    "ShardHeader",
    "TensorInfo",
    "open_checkpoint",
    "read_header",
]
