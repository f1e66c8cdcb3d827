"""Biases that a quantized checkpoint holds beside modules which have none in the model.

AutoGPTQ gave every quantized module a bias, of zeros where the model has none: those are dropped, and a note says so.
One that is not zero was computed to correct the outputs, and without it they are others. Headers do not tell these
apart, so a load looks at the values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from distquant.model.module_names import owner
from distquant.planning.load_plan import TensorPlan


def dropped_biases(tensors: Iterable[TensorPlan], stored: Collection[str]) -> list[str]:
    """Returns the biases beside weights of the model that no parameter takes, in the order of the alphabet.

    Args:
        tensors: the plan's.
        stored: names of the checkpoint's tensors.
    """
    used, modules = set[str](), set[str]()
    for tensor in tensors:
        names = [source.tensor for source in tensor.sources]
        used.update(names)
        modules.update(map(owner, names) if tensor.name.endswith(".weight") else ())
    return sorted(bias for bias in (f"{module}.bias" for module in modules) if bias in stored and bias not in used)
