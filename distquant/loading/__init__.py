"""Turns a model on `meta` into one rank's local model: local modules, styles, heads, adapters, completeness."""

from distquant.loading.finish import check_complete, finish
from distquant.loading.local_modules import set_tensor, shard_experts, shard_modules
from distquant.parallel.tensor_parallel import install_styles

__all__ = ["check_complete", "finish", "install_styles", "set_tensor", "shard_experts", "shard_modules"]
