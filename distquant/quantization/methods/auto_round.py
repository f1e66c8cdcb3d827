"""AutoRound checkpoints (arXiv:2309.05516): rounding is learned, the files are packed as GPTQ's or AWQ's.

`packing_format` names the layout (auto-round, `auto_round/inference/convert_model.py` and `backend.py`): `auto_gptq`
stores zero points less one, as GPTQ v1; the tool's own packing and `gptqmodel` store them as they are, and `auto_awq`
is AWQ's gemm layout. `extra_config` gives modules fields of their own: a module's exact name first, then patterns that
match anywhere in the name; 16 bits leave it unquantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from distquant.config import AutoRoundConfig
from distquant.config.checks import where
from distquant.errors import Problem
from distquant.model.description import ModelDescription
from distquant.patterns import compiled, pattern_error
from distquant.quantization.algorithms.rtn import Grid
from distquant.quantization.module_selection import disagreements, first_expert_name, in_blocks
from distquant.quantization.packed_int import PackedIntScheme
from distquant.quantization.packing import Packing, problems_of_fields, valid_fields
from distquant.quantization.registry import register
from distquant.quantization.scheme import Context

Kind = Literal["gptq", "gptq_v2", "awq"]

UNQUANTIZED = 16
"""Bits that leave a module as it is."""


def kind_of(packing_format: str) -> Kind | None:
    """The layout that a `packing_format` names, with or without `auto_round:` before it and a kernel behind."""
    parts = packing_format.lower().replace("auto-round", "auto_round").replace("autoround", "auto_round").split(":")
    parts = parts[1:] if parts[0] == "auto_round" and len(parts) > 1 else parts
    if parts[0] in ("gptq", "auto_gptq", "auto"):
        return "gptq"
    if parts[0] in ("awq", "auto_awq"):
        return "awq"
    return "gptq_v2" if parts[0] in ("auto_round", "gptqmodel", "exllamav2", "triton", "tritonv2") else None


@register
class AutoRoundScheme(PackedIntScheme):
    """The tensors of GPTQ or AWQ, dequantized in forward."""

    name = "auto-round"
    config_class = AutoRoundConfig
    form_fields: ClassVar[frozenset[str]] = frozenset({"packing_format", "data_type"})
    config: AutoRoundConfig

    def packing_of(self, module: str) -> Packing:
        config, own = self.config, valid_fields(self._own(module))
        bits = own.get("bits", config.bits)
        grid = Grid(bits, own.get("sym", config.sym))
        return Packing(self._kind, bits, own.get("group_size", config.group_size), grid)

    @property
    def _kind(self) -> Kind:
        return kind_of(self.config.packing_format) or "gptq"

    def _own(self, module: str) -> Mapping[str, Any]:
        """A module's own fields."""
        rules = self.config.extra_config or {}
        exact = next((name for name in self.names.of(module) if name in rules), None)
        if exact is not None:
            return rules[exact] if isinstance(rules[exact], Mapping) else {}
        for pattern, own in rules.items():
            if not own or not isinstance(own, Mapping) or pattern_error(pattern) is not None:
                continue
            if self.names.matching(pattern, module, _holds):
                return own
        return {}

    def select_modules(self, description: ModelDescription) -> list[str]:
        config = self.config
        asked = config.block_name_to_quantize or config.to_quant_block_names
        blocks = None if asked is None else list(_flat(asked.split(",") if isinstance(asked, str) else asked))
        names = in_blocks(description, blocks, self.names)
        inside = set(names)
        named = [name for name in description.linears if name not in inside and self._own(first_expert_name(name))]
        return [name for name in (*names, *named) if self.selects(name) and not self._left_out(name)]

    def _left_out(self, module: str) -> bool:
        return self._own(first_expert_name(module)).get("bits", self.config.bits) == UNQUANTIZED

    def validate(self, context: Context) -> list[Problem]:
        config = self.config
        problems = super().validate(context)
        if not context.prequantized:
            fault = "learns its rounding on data, which is not supported"
            problems.append(
                Problem("quantization_config", f"auto-round {fault}", "Take gptq-rtn, or a quantized checkpoint")
            )
        kind = kind_of(config.packing_format)
        if kind is None:
            fault = f"{config.packing_format!r} is not supported"
            fix = "Export with auto_round:auto_gptq or auto_round:auto_awq"
            problems.append(Problem(where("packing_format"), fault, fix))
        named = {name: getattr(config, name) for name in ("bits", "data_type", "act_bits", "super_bits")}
        problems += _problems_of_values("", named, kind)
        for pattern, own in (config.extra_config or {}).items():
            if not isinstance(own, Mapping) or own.get("bits") != UNQUANTIZED:
                problems += problems_of_fields("extra_config", pattern, own)
                problems += _problems_of_values(pattern, own if isinstance(own, Mapping) else {}, kind)
        if config.extra_config:
            problems += disagreements(
                context.description, lambda module: (self._left_out(module), self.packing_of(module))
            )
        return problems


def _holds(regex: str, name: str) -> bool:
    """True if the regular expression matches somewhere in a name."""
    return compiled(regex).search(name)


def _flat(names: Any) -> Iterator[str]:
    """Yields the names in nested lists."""
    for name in names:
        if isinstance(name, str):
            yield name
        else:
            yield from _flat(name)


def _problems_of_values(module: str, fields: Mapping[str, Any], kind: Kind | None) -> Iterator[Problem]:
    """Values that are not supported, in the whole config (module "") or in a module's own fields."""
    bits = (4,) if kind == "awq" else (2, 3, 4, 8)
    fix = "Export integer weights of 2, 3, 4 or 8 bits (AWQ's packing: 4) without quantized activations"
    allowed = {"bits": bits, "data_type": (None, "int"), "super_bits": (None,), "act_bits": (None, *range(16, 33))}
    for key, values in allowed.items():
        if fields.get(key) not in (None, *values):
            field, owner = ("extra_config", f"{module!r} has {key}=") if module else (key, "")
            yield Problem(where(field), f"{owner}{fields[key]!r} is not supported", fix)
