"""`output_attentions` on a sharded model: each rank computes the weights of its own heads, and callers get all heads.

Attention modules return their weights whether or not anyone asked, so ranks exchange them only in a forward that
asks. Hooks are installed at load: those with which transformers records outputs come later, and so see all heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from distquant.parallel.comm import Axis
from distquant.parallel.tensor_parallel import gather_output
from distquant.planning.load_plan import LoadPlan

HEADS = 1
"""Dim of the heads in attention weights, `[batch, heads, queries, keys]`."""


@dataclass
class Asked:
    """True while a forward runs in which the caller wants attention weights."""

    config: Any
    value: bool = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        asked = kwargs.get("output_attentions")
        self.value = bool(getattr(self.config, "output_attentions", False) if asked is None else asked)


@dataclass(frozen=True)
class GatherWeights:
    """After an attention module: its weights, of all query heads."""

    asked: Asked
    axis: Axis
    sizes: list[int]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.asked.value or not isinstance(output, tuple) or len(output) < 2 or output[1] is None:
            return output
        weights: Tensor = output[1]
        whole = gather_output(weights.movedim(HEADS, -1), self.axis, self.sizes).movedim(-1, HEADS)
        return (output[0], whole, *output[2:])


def install_weight_gathering(model: Any, plan: LoadPlan, axis: Axis) -> None:
    """Installs the hooks on a model whose heads ranks of an axis divide."""
    if not plan.attentions:
        return
    asked = Asked(model.config.get_text_config(decoder=True))
    model.base_model.register_forward_pre_hook(asked, with_kwargs=True)
    for name, attention in plan.attentions.items():
        sizes = plan.heads[attention.heads].query.lengths
        model.get_submodule(name).register_forward_hook(GatherWeights(asked, axis, sizes))
