"""Turns a model on `meta` into one rank's local model: local modules, styles, heads, adapters, completeness."""

from distquant.assemble.finish import check_complete, finish
from distquant.assemble.local import localize, localize_experts, set_tensor
from distquant.assemble.parallel import install_styles

__all__ = ["check_complete", "finish", "install_styles", "localize", "localize_experts", "set_tensor"]
