"""AutoRound: learned rounding, in files packed like GPTQ's or AWQ's.

Fields and defaults are those of `AutoRoundConfig` (`transformers/utils/quantization_config.py` 5.23) and of the tool's
own files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from distquant.config.base import QuantizationConfig
from distquant.config.checks import check_group_size, check_one_of
from distquant.config.gptq import AwqConfig, GptqConfig
from distquant.config.vocabulary import Activations, Precision
from distquant.errors import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoRoundConfig(QuantizationConfig):
    """AutoRound (arXiv:2309.05516): rounding is learned; the files are packed like GPTQ's or AWQ's."""

    quant_method: ClassVar[str] = "auto-round"
    method_spellings: ClassVar[frozenset[str]] = frozenset({"intel/auto-round"})
    loading_attributes: ClassVar[frozenset[str]] = frozenset({"backend"})
    sparse: ClassVar[frozenset[str]] = frozenset(
        {
            "data_type", "act_bits", "act_data_type", "act_group_size", "act_sym", "act_dynamic", "super_bits",
            "super_group_size", "extra_config", "block_name_to_quantize", "to_quant_block_names",
        }
    )  # fmt: skip
    record_keys: ClassVar[frozenset[str]] = frozenset(
        {
            "autoround_version", "iters", "lr", "minmax_lr", "lr_scheduler", "nsamples", "seqlen", "batch_size",
            "gradient_accumulate_steps", "enable_quanted_input", "enable_minmax_tuning", "enable_norm_bias_tuning",
            "enable_torch_compile", "enable_alg_ext", "low_gpu_mem_usage", "low_cpu_mem_usage", "amp", "scale_dtype",
            "dataset", "damp_percent", "desc_act", "true_sequential", "quant_block_list", "sampler", "not_use_best_mse",
            "dynamic_max_gap", "static_kv_dtype",
        }
    )  # fmt: skip

    bits: int = 4
    """Bits of a weight, 2 to 8."""
    group_size: int = 128
    """Consecutive inputs that share a scale; -1 takes all inputs."""
    sym: bool = True
    """True if the range is symmetric about zero."""
    backend: str = "auto"
    """The kernel that multiplies. Changes no stored bit."""
    packing_format: str = "auto_round:gptq"
    """The layout: `auto_round:gptq`, `auto_round:auto_gptq`, `auto_round:auto_awq`, and others of its tool."""
    data_type: str | None = None
    """The type of a code; None = int."""
    act_bits: int | None = None
    """Bits of an activation; None or 16 = not quantized."""
    act_data_type: str | None = None
    act_group_size: int | None = None
    act_sym: bool | None = None
    act_dynamic: bool | None = None
    super_bits: int | None = None
    """Bits of a quantized scale (the formats of GGUF)."""
    super_group_size: int | None = None
    extra_config: Mapping[str, Any] | None = None
    """Module, or pattern of modules -> its own fields; 16 bits leave it unquantized."""
    block_name_to_quantize: str | tuple[str, ...] | None = None
    """The blocks that are quantized."""
    to_quant_block_names: str | tuple[Any, ...] | None = None
    """The same, under the name of newer versions of the tool."""

    @classmethod
    def convert_from(cls, checkpoint: QuantizationConfig) -> AutoRoundConfig | None:
        """Converts plain GPTQ (v1) and AWQ (gemm), which transformers loads with AutoRound's kernels if asked to."""
        same: dict[str, Any] = {"include_modules": checkpoint.include_modules, "layers": checkpoint.layers}
        if isinstance(checkpoint, GptqConfig):
            plain_gptq = checkpoint.format == "gptq" and checkpoint.meta is None and not checkpoint.desc_act
            if not plain_gptq or checkpoint.dynamic is not None:
                return None
            same |= {"sym": checkpoint.sym, "packing_format": "auto_round:gptq"}
        elif isinstance(checkpoint, AwqConfig) and checkpoint.format == "gemm":
            skipped = checkpoint.modules_to_not_convert or ()
            same |= {"sym": not checkpoint.zero_point, "packing_format": "auto_round:awq"}
            same |= {"extra_config": {name: {"bits": 16} for name in skipped} or None}
        else:
            return checkpoint if isinstance(checkpoint, AutoRoundConfig) else None
        return AutoRoundConfig(bits=checkpoint.bits, group_size=checkpoint.group_size, **same)

    def meaning(self, name: str) -> Any:
        value = getattr(self, name)
        if name == "packing_format":  # the defaults mean the same as the names that the tool writes today
            return {"auto_round:gptq": "auto_round:auto_gptq", "auto_round:awq": "auto_round:auto_awq"}.get(
                value, value
            )
        return value

    def _value_problems(self) -> Iterable[Problem]:
        yield from check_one_of("bits", self.bits, range(2, 9))
        yield from check_group_size(self.group_size, "all inputs")

    def vocabulary(self) -> tuple[Precision, ...]:
        kind = self.data_type or "int"
        modules = self.extra_config or {}
        left_out = tuple(name for name, own in modules.items() if isinstance(own, Mapping) and own.get("bits") == 16)
        act: Activations = None
        if (self.act_bits or 16) < 16:
            act = "static" if self.act_dynamic is False else "dynamic"
        return (
            Precision(
                weight=f"{'' if self.sym or kind != 'int' else 'u'}{kind}{self.bits if kind == 'int' else ''}",
                bits=self.bits,
                group="row" if self.group_size == -1 else self.group_size,
                symmetric=self.sym,
                scale_dtype="float16",
                storage_dtype="int32",
                activations=act,
                excluded=left_out or None,
            ),
        )
