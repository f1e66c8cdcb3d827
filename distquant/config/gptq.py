"""GPTQ and AWQ: groups along the inputs with scales and zero points, in the files of gptqmodel, AutoGPTQ and AutoAWQ.

Both are one family in transformers too (`AwqConfig` derives from `GPTQConfig`, `utils/quantization_config.py` 5.23):
the fields of calibration are the same, and both write them. Without `dataset` and `tokenizer` there is nothing to
calibrate on: an unquantized checkpoint is then rounded to nearest, in the same layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from distquant.config.base import QuantizationConfig
from distquant.config.checks import check_group_size, check_one_of, check_positive, where
from distquant.config.plain import plain
from distquant.config.vocabulary import Precision
from distquant.errors import Problem

DATASETS = ("wikitext2", "c4", "c4-new")
"""Calibration data sets with names."""

_CALIBRATION = frozenset(
    {
        "tokenizer", "dataset", "damp_percent", "act_group_aware", "true_sequential", "meta", "model_seqlen",
        "block_name_to_quantize", "module_name_preceding_first_block", "batch_size", "pad_token_id",
        "cache_block_outputs",
    }
)  # fmt: skip
_LOADING = frozenset({"max_input_length", "backend"})
_OLD_KERNELS = {"use_exllama", "disable_exllama", "exllama_config", "use_cuda_fp16"}


def _round_to_nearest(name: str) -> dict[str, dict[str, Any]]:
    """Returns the short names of 4 bits that need no calibration: of groups of 128, 64 and 32."""
    return {name: {"bits": 4}, **{f"{name}-g{size}": {"bits": 4, "group_size": size} for size in (64, 32)}}


def _lowered(given: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Returns the dict with the strings under some keys in lower case."""
    values = {key: plain(given[key]) for key in keys if key in given}
    return {**given, **{key: value.lower() for key, value in values.items() if isinstance(value, str)}}


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibratedConfig(QuantizationConfig):
    """The fields that GPTQ and AWQ share: the group, and the calibration."""

    loading_attributes: ClassVar[frozenset[str]] = _LOADING
    none_is_default: ClassVar[frozenset[str]] = frozenset({"backend"})
    history: ClassVar[frozenset[str]] = _CALIBRATION | {"recorded"}

    bits: int = 4
    """Bits of a weight: 2, 3, 4 or 8."""
    group_size: int = 128
    """Consecutive inputs that share a scale; -1 takes all inputs."""
    desc_act: bool = False
    """True if columns were quantized in the order of activation size; `g_idx` then holds each column's group."""
    sym: bool = True
    """True if the range is symmetric about zero."""
    backend: str = "auto"
    """The kernel that multiplies. Changes no stored bit."""
    max_input_length: int | None = None
    """Longest input of the exllama kernel with `desc_act`. Changes no stored bit."""
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
    """Notes of the tool about itself."""
    model_seqlen: int | None = None
    """Tokens of a calibration sample."""
    block_name_to_quantize: str | tuple[str, ...] | None = None
    """The module list of the blocks; AutoRound joins several with commas."""
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
        """True if an unquantized checkpoint is quantized without calibration."""
        return self.dataset is None and self.tokenizer is None

    def derived_fields(self) -> Mapping[str, Any]:
        return {"act_group_aware": False} if self.desc_act else {}

    def _value_problems(self) -> Iterable[Problem]:
        yield from check_one_of("bits", self.bits, (2, 3, 4, 8))
        yield from check_group_size(self.group_size, "all inputs")
        yield from check_positive("batch_size", self.batch_size)
        yield from check_positive("model_seqlen", self.model_seqlen)
        yield from check_positive("max_input_length", self.max_input_length)
        if not 0 < self.damp_percent < 1:
            yield Problem(where("damp_percent"), f"{self.damp_percent} is not between 0 and 1", "Give 0.1, the usual.")
        if isinstance(self.dataset, str):
            yield from check_one_of("dataset", self.dataset, DATASETS)

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
    short_names: ClassVar[Mapping[str, Mapping[str, Any]]] = _round_to_nearest("gptq-rtn")

    bits: int
    """Bits of a weight: 2, 3, 4 or 8."""
    format: Literal["gptq", "gptq_v2", "marlin", "bitblas"] = "gptq"
    """The layout: zero points less one (`gptq`), unchanged (`gptq_v2`), or one kernel's own."""
    lm_head: bool = False
    """True if the output head is quantized too."""
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

    `format` is the key that older files call `version`. `zero_point` is the opposite of `sym` in other methods;
    transformers writes `sym` as well, and here it has no effect.
    """

    quant_method: ClassVar[str] = "awq"
    aliases: ClassVar[Mapping[str, str]] = {"version": "format", "w_bit": "bits", "q_group_size": "group_size"}
    echoes: ClassVar[Mapping[str, str]] = {"version": "format"}
    history: ClassVar[frozenset[str]] = _CALIBRATION | {"recorded", "sym"}
    record_keys: ClassVar[frozenset[str]] = frozenset(
        {"do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "checkpoint_format", "pack_dtype"}
    )
    skip_field: ClassVar[str | None] = "modules_to_not_convert"
    short_names: ClassVar[Mapping[str, Mapping[str, Any]]] = _round_to_nearest("awq-rtn")

    zero_point: bool = True
    """True if groups have a zero point; otherwise the range is symmetric."""
    format: Literal["gemm", "gemv", "gemv_fast", "llm-awq"] = "gemm"
    """The layout, named for the kernel that reads it."""
    backend: Literal[
        "auto", "auto_trainable", "machete", "marlin", "exllama_v2", "exllama_v1", "gemm", "gemm_triton", "gemv",
        "gemv_fast", "torch_awq", "torch_fused_awq",
    ] = "auto"  # fmt: skip
    """The kernel that multiplies. Changes no stored bit."""
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
