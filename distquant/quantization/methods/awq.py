"""AWQ checkpoints (arXiv:2306.00978) in the layout of the gemm kernel, and rounding to nearest into it.

The layout is AutoAWQ's (`awq/modules/linear/gemm.py`, `WQLinear_GEMM`): 4-bit codes packed along the outputs, eight a
word in the order 0, 2, 4, 6, 1, 3, 5, 7, zero points likewise and as they are. Scaling by activations, which makes it
AWQ, is stored in the weights of a calibrated checkpoint and of its norms; loading does not repeat it.

Rounding to nearest (`awq-rtn`) takes AutoAWQ's grid in `rtn`; `zero_point=False` takes the symmetric grid there,
with the zero point 8 stored.
"""

from __future__ import annotations

from typing import ClassVar

from distquant.config import AwqConfig
from distquant.config.checks import where
from distquant.errors import Problem
from distquant.model.description import ModelDescription
from distquant.quantization.algorithms.rtn import Grid
from distquant.quantization.packed_int import PackedIntScheme
from distquant.quantization.packing import Packing, problems_of_calibration
from distquant.quantization.registry import register
from distquant.quantization.scheme import Context

MINIMUM_RANGE = 1e-5
"""Smallest range of a group, by AutoAWQ."""


@register
class AwqScheme(PackedIntScheme):
    """AWQ's tensors, dequantized in forward."""

    name = "awq"
    config_class = AwqConfig
    form_fields: ClassVar[frozenset[str]] = frozenset({"format"})
    config: AwqConfig

    def packing_of(self, module: str) -> Packing:
        config = self.config
        return Packing("awq", config.bits, config.group_size, Grid(config.bits, not config.zero_point, MINIMUM_RANGE))

    def select_modules(self, description: ModelDescription) -> list[str]:
        """All linears except those named and the default skips, as transformers has it (`integrations/awq.py`)."""
        return [name for name in description.linears if self.selects(name) and name not in description.default_skip]

    def matching(self, pattern: str, name: str) -> bool:
        """Also True if the pattern is a part of a name: so AutoAWQ and vLLM read the list of a stored checkpoint."""
        is_part = any(pattern in known for known in self.names.of(name)) if self.names.wrapped else False
        return is_part or super().matching(pattern, name)

    def validate(self, context: Context) -> list[Problem]:
        config = self.config
        problems = super().validate(context)
        if config.format != "gemm":
            fault = f"{config.format!r} is another kernel's layout, only gemm is supported"
            problems.append(Problem(where("format"), fault, "Quantize with version='gemm', or load the original"))
        if config.bits != 4:
            fault = f"{config.bits}: the gemm layout holds 4 bits only"
            problems.append(Problem(where("bits"), fault, "Set it to 4, or take gptq-rtn"))
        if config.modules_in_block_to_quantize is not None:
            fix = "Name the modules to leave out in modules_to_not_convert"
            problems.append(Problem(where("modules_in_block_to_quantize"), "has no meaning for AWQ", fix))
        if not context.prequantized:
            problems += problems_of_calibration(config)
        return problems
