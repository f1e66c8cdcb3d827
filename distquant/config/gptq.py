"""GPTQ and AWQ: groups along the inputs with scales and zero points, in the files of gptqmodel, AutoGPTQ and AutoAWQ.

Both are one family in transformers too (`AwqConfig` derives from `GPTQConfig`, `utils/quantization_config.py` 5.23):
the fields of calibration are the same, and are written by both. Without `dataset` and `tokenizer` there is nothing to
calibrate on, and an unquantized checkpoint is rounded to nearest in the same layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from distquant.config.base import QuantizationConfig
from distquant.config.checks import group_size, one_of, positive, where
from distquant.config.plain import plain
from distquant.config.vocabulary import Activations, Precision
from distquant.errors import Problem

DATASETS = ("wikitext2", "c4", "c4-new")
"""Calibration data sets that have names."""

_CALIBRATION = frozenset(
    {
        "tokenizer", "dataset", "damp_percent", "act_group_aware", "true_sequential", "meta", "model_seqlen",
        "block_name_to_quantize", "module_name_preceding_first_block", "batch_size", "pad_token_id",
        "cache_block_outputs",
    }
)  # fmt: skip
_LOADING = frozenset({"max_input_length", "backend"})
_OLD_KERNELS = {"use_exllama", "disable_exllama", "exllama_config", "use_cuda_fp16"}


def _lowered(given: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """The dict with the strings under some keys in lower case."""
    values = {key: plain(given[key]) for key in keys if key in given}
    return {**given, **{key: value.lower() for key, value in values.items() if isinstance(value, str)}}


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibratedConfig(QuantizationConfig):
    """What GPTQ and AWQ share: the group, and how the checkpoint was calibrated."""

    loading_attributes: ClassVar[frozenset[str]] = _LOADING
    none_is_default: ClassVar[frozenset[str]] = frozenset({"backend"})
    history: ClassVar[frozenset[str]] = _CALIBRATION | {"recorded"}

    bits: int = 4
    """Bits of a weight: 2, 3, 4 or 8."""
    group_size: int = 128
    """Consecutive inputs that share a scale; -1 takes all inputs."""
    desc_act: bool = False
    """Columns were quantized in the order of activation size; `g_idx` then tells each column's group."""
    sym: bool = True
    """The range is symmetric about zero."""
    backend: str = "auto"
    """The kernel that multiplies. Touches no stored bit."""
    max_input_length: int | None = None
    """Longest input of the exllama kernel with `desc_act`. Touches no stored bit."""
    tokenizer: str | None = None
    """Name or path of the tokenizer of the calibration data."""
    dataset: str | tuple[str, ...] | None = None
    """Calibration texts, or the name of a known data set."""
    damp_percent: float = 0.1
    """Share of the mean Hessian diagonal that is added to it."""
    act_group_aware: bool = True
    """Order columns within groups only. Always false with `desc_act`."""
    true_sequential: bool = True
    """Quantize the linears of a block one after the other."""
    meta: Mapping[str, Any] | None = None
    """What the tool noted about itself."""
    model_seqlen: int | None = None
    """Tokens of a calibration sample."""
    block_name_to_quantize: str | None = None
    """The module list of the blocks."""
    module_name_preceding_first_block: tuple[str, ...] | None = None
    """Modules that run before the first block."""
    batch_size: int = 1
    """Calibration samples of a batch."""
    pad_token_id: int | None = None
    """Token that pads a batch."""
    cache_block_outputs: bool = True
    """Keep a block's outputs as inputs of the next."""
    modules_in_block_to_quantize: tuple[tuple[str, ...], ...] | None = None
    """The only modules of a block that are quantized, in the order in which they were."""

    @property
    def round_to_nearest(self) -> bool:
        """Whether an unquantized checkpoint is quantized without calibration."""
        return self.dataset is None and self.tokenizer is None

    def settled(self) -> Mapping[str, Any]:
        return {"act_group_aware": False} if self.desc_act else {}

    def _value_problems(self) -> Iterable[Problem]:
        yield from one_of("bits", self.bits, (2, 3, 4, 8))
        yield from group_size(self.group_size, "all inputs")
        yield from positive("batch_size", self.batch_size)
        yield from positive("model_seqlen", self.model_seqlen)
        yield from positive("max_input_length", self.max_input_length)
        if not 0 < self.damp_percent < 1:
            yield Problem(where("damp_percent"), f"{self.damp_percent} is not between 0 and 1", "Give 0.1, the usual.")
        if isinstance(self.dataset, str):
            yield from one_of("dataset", self.dataset, DATASETS)

    def _precision(self, symmetric: bool, excluded: tuple[str, ...] | None) -> Precision:
        named = self.modules_in_block_to_quantize
        return Precision(
            weight=f"int{self.bits}" if symmetric else f"uint{self.bits}",
            bits=self.bits,
            group="row" if self.group_size == -1 else self.group_size,
            symmetric=symmetric,
            scale_dtype="float16",
            compute_dtype="float16",
            storage_dtype="int32",
            modules=None if named is None else tuple(name for names in named for name in names),
            excluded=excluded,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GptqConfig(CalibratedConfig):
    """GPTQ (arXiv:2210.17323).

    `format` is the key that older files call `checkpoint_format`; files without either are `gptq` (v1), which stores
    each zero point less one.
    """

    quant_method: ClassVar[str] = "gptq"
    aliases: ClassVar[Mapping[str, str]] = {"checkpoint_format": "format"}
    echoes: ClassVar[Mapping[str, str]] = {"checkpoint_format": "format"}
    sparse: ClassVar[frozenset[str]] = frozenset({"lm_head", "dynamic", "pack_dtype"})
    record_keys: ClassVar[frozenset[str]] = frozenset(
        {
            "static_groups", "model_name_or_path", "model_file_base_name", "is_marlin_format", "damp_auto_increment",
            "mse", "hyb_act", "rotation", "adapter", "parallel_packing", "offload_to_disk", "offload_to_disk_path",
            "v2", "v2_alpha", "v2_memory_device", "gptaq", "gptaq_alpha", "fail_safe", "failsafe", "quantizer",
            "awq_gemm_checkpoint", "hessian", "mock_quantization", "modules_to_not_convert", *_OLD_KERNELS,
        }
    )  # fmt: skip
    short_names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"gptq-rtn": {"bits": 4}}

    bits: int
    """Bits of a weight: 2, 3, 4 or 8."""
    format: Literal["gptq", "gptq_v2", "marlin", "bitblas"] = "gptq"
    """The layout: zero points less one (`gptq`), as they are (`gptq_v2`), or one kernel's own."""
    lm_head: bool = False
    """The output head is quantized too."""
    dynamic: Mapping[str, Any] | None = None
    """Pattern of modules -> their own fields; a pattern that begins with `-:` leaves its modules out (gptqmodel)."""
    pack_dtype: Literal["int32", "int16", "int8", "int64"] | None = None
    """The dtype of packed words; None = int32."""

    @classmethod
    def _spelled(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        spelled = _lowered(given, ("checkpoint_format", "format", "backend"))
        if spelled.get("is_marlin_format") and not (spelled.get("checkpoint_format") or spelled.get("format")):
            spelled["format"] = "marlin"
        return {key: value for key, value in spelled.items() if key != "checkpoint_format" or value is not None}

    def vocabulary(self) -> tuple[Precision, ...]:
        left_out = tuple(pattern[2:] for pattern in self.dynamic or () if pattern.startswith("-:"))
        return (self._precision(self.sym, left_out or None),)


@dataclass(frozen=True, kw_only=True, slots=True)
class AwqConfig(CalibratedConfig):
    """AWQ (arXiv:2306.00978).

    `format` is the key that older files call `version`; `zero_point` says the opposite of what `sym` says elsewhere
    (transformers writes `sym` all the same, and it means nothing here).
    """

    quant_method: ClassVar[str] = "awq"
    aliases: ClassVar[Mapping[str, str]] = {"version": "format", "w_bit": "bits", "q_group_size": "group_size"}
    echoes: ClassVar[Mapping[str, str]] = {"version": "format"}
    history: ClassVar[frozenset[str]] = _CALIBRATION | {"recorded", "sym"}
    record_keys: ClassVar[frozenset[str]] = frozenset(
        {"do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "checkpoint_format", "pack_dtype"}
    )
    skip_field: ClassVar[str | None] = "modules_to_not_convert"
    short_names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"awq-rtn": {"bits": 4}}

    zero_point: bool = True
    """Groups have a zero point; without, the range is symmetric."""
    format: Literal["gemm", "gemv", "gemv_fast", "llm-awq"] = "gemm"
    """The layout, named for the kernel that reads it."""
    backend: Literal[
        "auto", "auto_trainable", "machete", "marlin", "exllama_v2", "exllama_v1", "gemm", "gemm_triton", "gemv",
        "gemv_fast", "torch_awq", "torch_fused_awq",
    ] = "auto"  # fmt: skip
    """The kernel that multiplies. Touches no stored bit."""
    modules_to_not_convert: tuple[str, ...] | None = None
    """Patterns of modules not to convert; None leaves the choice to the model (its output head)."""

    @classmethod
    def _spelled(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        spelled = _lowered(given, ("version", "format", "backend"))
        if spelled.get("backend") == "llm-awq":
            spelled |= {"backend": "auto", "format": "llm-awq"}
            spelled.pop("version", None)
        if spelled.get("backend") == "autoawq":
            spelled["backend"] = "auto"
        return {key: value for key, value in spelled.items() if key != "version" or value is not None}

    def vocabulary(self) -> tuple[Precision, ...]:
        return (self._precision(not self.zero_point, self.modules_to_not_convert),)


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
    """The range is symmetric about zero."""
    backend: str = "auto"
    """The kernel that multiplies. Touches no stored bit."""
    packing_format: str = "auto_round:gptq"
    """The layout: `auto_round:gptq`, `auto_round:auto_gptq`, `auto_round:auto_awq`, and others of its tool."""
    data_type: str | None = None
    """What a code stands for; None = int."""
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
    """The same, as newer versions of the tool call it."""

    @classmethod
    def adopt(cls, checkpoint: QuantizationConfig) -> AutoRoundConfig | None:
        """transformers loads plain GPTQ (v1) and AWQ (gemm) checkpoints with AutoRound's kernels when asked to."""
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
        if name == "packing_format":  # its default says the same as the names that the tool writes today
            return {"auto_round:gptq": "auto_round:auto_gptq", "auto_round:awq": "auto_round:auto_awq"}.get(
                value, value
            )
        return value

    def _value_problems(self) -> Iterable[Problem]:
        yield from one_of("bits", self.bits, range(2, 9))
        yield from group_size(self.group_size, "all inputs")

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
