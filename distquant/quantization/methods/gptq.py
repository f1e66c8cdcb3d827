"""GPTQ checkpoints (arXiv:2210.17323), and rounding to nearest into their layout.

The layout is that of AutoGPTQ and GPTQModel (`nn_modules/qlinear/__init__.py`): codes of 2, 3, 4 or 8 bits packed along
the inputs, zero points packed along the outputs. `format` says how zero points are stored: `gptq` (v1) less one,
`gptq_v2` as they are. Other formats are one kernel's own order of bytes, and not supported.

Rounding to nearest (`gptq-rtn`) takes the grid of `rtn`, and the config's `bits`, `group_size`, `sym` and `format`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from distquant.config import GptqConfig
from distquant.config.checks import where
from distquant.config.evidence import changed_meaning
from distquant.errors import Problem, listed
from distquant.model.description import ModelDescription
from distquant.patterns import compiled, pattern_error, shortened
from distquant.quantization.algorithms.rtn import Grid
from distquant.quantization.module_selection import (
    disagreements,
    first_expert_name,
    in_blocks,
    members,
)
from distquant.quantization.packed_int import PackedIntScheme
from distquant.quantization.packing import (
    DECIDING_FIELDS,
    Packing,
    problems_of_calibration,
    problems_of_fields,
    valid_fields,
)
from distquant.quantization.registry import register
from distquant.quantization.scheme import Context

CALIBRATION = frozenset(
    {
        "damp_percent", "damp_auto_increment", "mse", "static_groups", "true_sequential", "act_group_aware", "hyb_act",
        "v2", "v2_alpha", "gptaq", "gptaq_alpha", "fail_safe", "failsafe", "hessian",
    }
)  # fmt: skip
"""Fields of a `dynamic` rule that record how a module was calibrated."""


LAYOUT = frozenset({"format", "checkpoint_format", "method", "quant_method", "pack_dtype"})
"""Fields of such a rule that would give modules another layout."""


@register
class GptqScheme(PackedIntScheme):
    """GPTQ's tensors, dequantized in forward."""

    name = "gptq"
    config_class = GptqConfig
    form_fields: ClassVar[frozenset[str]] = frozenset({"format", "pack_dtype"})
    config: GptqConfig

    def packing_of(self, module: str) -> Packing:
        config, own = self.config, valid_fields(self._dynamic(module))
        bits, symmetric = own.get("bits", config.bits), own.get("sym", config.sym)
        kind: Literal["gptq", "gptq_v2"] = "gptq_v2" if config.format == "gptq_v2" else "gptq"
        return Packing(
            kind=kind,
            bits=bits,
            group_size=own.get("group_size", config.group_size),
            grid=Grid(bits, symmetric),
            act_order=own.get("desc_act", config.desc_act),
            index=True,
        )

    def _dynamic(self, module: str) -> Mapping[str, Any] | None:
        """A module's own fields; None where a rule leaves it out.

        As GPTQModel (`quantization/config.py`, `dynamic_get`): the first pattern that matches from the start decides.
        """
        for pattern, own in (self.config.dynamic or {}).items():
            regex = regex_of(pattern)
            if pattern_error(regex) is None and self.names.matching(regex, module, _starts):
                return None if pattern.startswith("-:") else own
        return {}

    def select_modules(self, description: ModelDescription) -> list[str]:
        config = self.config
        asked = config.block_name_to_quantize
        blocks = asked.split(",") if isinstance(asked, str) else asked
        names = in_blocks(description, blocks or None, self.names)
        if config.modules_in_block_to_quantize is not None:
            named = tuple(f".{name}" for names in config.modules_in_block_to_quantize for name in names)
            names = [name for name in names if any(n.endswith(named) for n in self._member_names(description, name))]
        head = description.output_embedding
        if config.lm_head and head is not None and head in description.linears:
            names.append(head)
        return [name for name in names if self.selects(name) and not self._left_out(name)]

    def _member_names(self, description: ModelDescription, name: str) -> Iterator[str]:
        """Yields all names of a module, or of all experts of a stack."""
        for member in members(description, name):
            yield from self.names.of(member)

    def _left_out(self, module: str) -> bool:
        return self._dynamic(first_expert_name(module)) is None

    def validate(self, context: Context) -> list[Problem]:
        config = self.config
        problems = super().validate(context)
        if config.format not in ("gptq", "gptq_v2"):
            fault = f"{config.format!r} is one kernel's own order of bytes; only gptq and gptq_v2 are supported"
            problems.append(Problem(where("format"), fault, "Convert the checkpoint to gptq with GPTQModel"))
        if config.pack_dtype not in (None, "int32"):
            fault = f"{config.pack_dtype!r}: only words of int32 are supported"
            problems.append(Problem(where("pack_dtype"), fault, "Quantize with pack_dtype='int32'"))
        for pattern, own in (config.dynamic or {}).items():
            problems += _problems_of_rule(pattern, own, context.prequantized)
        if config.dynamic:
            problems += disagreements(
                context.description, lambda module: (self._left_out(module), self.packing_of(module))
            )
        if not context.prequantized:
            problems += problems_of_calibration(config)
            problems += listed(self._unmatched(context.description))
        return problems

    def _unmatched(self, description: ModelDescription) -> Iterator[Problem]:
        """Yields the rules for modules that this model does not have."""
        fix = "Name modules of this model, or remove it"
        names = [member for name in description.linears for member in members(description, name)]
        for pattern in self.config.dynamic or {}:
            regex = regex_of(pattern)
            if pattern_error(regex) is None and not any(self.names.matching(regex, name, _starts) for name in names):
                yield Problem(where("dynamic"), f"{pattern!r} matches no linear module", fix)
        for named in self.config.modules_in_block_to_quantize or ():
            for module in named:
                if not any(one.endswith(f".{module}") for name in names for one in self.names.of(name)):
                    yield Problem(where("modules_in_block_to_quantize"), f"{module!r} matches no linear module", fix)


def _starts(regex: str, name: str) -> bool:
    """True if a name begins as the regular expression says."""
    return compiled(regex).match(name)


def regex_of(pattern: str) -> str:
    """The regular expression of a `dynamic` rule."""
    return pattern.removeprefix("-:").removeprefix("+:")


def _problems_of_rule(pattern: str, own: Any, stored: bool) -> Iterator[Problem]:
    """Faults of one rule: its pattern, and the fields that it sets; a stored one may record what changes nothing."""
    error = pattern_error(regex_of(pattern))
    if error is not None:
        yield Problem(
            where("dynamic"), f"{shortened(pattern)} is not a regular expression ({error})", "Correct the pattern"
        )
    if pattern.startswith("-:"):
        return
    yield from problems_of_fields("dynamic", pattern, own)
    others = set(own if isinstance(own, Mapping) else ()) - DECIDING_FIELDS.keys() - CALIBRATION
    for key in sorted(key for key in others if not stored or key in LAYOUT or changed_meaning(key, own[key])):
        fault = f"{pattern!r} sets {key}, which cannot differ between modules"
        yield Problem(where("dynamic"), fault, f"Only {', '.join(sorted(DECIDING_FIELDS))} can")
