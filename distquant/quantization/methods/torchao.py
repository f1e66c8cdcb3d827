"""torchao: int8, float8 and unpacked low-bit integers in torchao's own tensors, per row, per group or per tensor.

A local module is a plain `nn.Linear` whose weight is torchao's tensor subclass of local size, so that torchao's
kernels, PEFT and transformers see what they know. By torchao 0.18:

| configuration | tensor | codes | scale | zero point |
|---|---|---|---|---|
| `Int8WeightOnlyConfig`, `Int8DynamicActivationInt8WeightConfig` | `Int8Tensor` | int8 | float32 | int8 |
| `Float8WeightOnlyConfig` | `Float8Tensor` | float8 | float32 | |
| `IntxWeightOnlyConfig` | `IntxUnpackedToInt8Tensor` | int8 | the weight's dtype | int8 |

Codes are `[out, in]`, scales and zero points `[out, 1]`, `[out, in / group]` or `[1, 1]`. Rows and groups are quantized
by torchao itself (`quantization/quantize_/workflows`, `from_hp`), so its definition is the only one; divisions by
constants round differently in torch's CUDA kernels, so bits are those of torchao on the same kind of device. A scale
for the whole tensor needs all rows first: they flow in 16 bits beside each row's largest magnitude, and are quantized
by the ranks that keep them.

One difference: rows of zeros have scale 0 in `Float8Tensor`, and upstream's codes are then 0/0, NaN; here they are
zeros.

Checkpoints are those of `torchao.prototype.safetensors` as transformers 5.23 writes them: `<module>._weight_qdata` and
so on, with the tensors' attributes as JSON in the header's `__metadata__`. All of these follow from the configuration
and the shape, so the metadata is not needed.

With int8 activations (`Int8DynamicActivationInt8WeightConfig`) a row-parallel shard quantizes its own part of each
activation, as LLM.int8 does, and torchao gives no gradient to the inputs: adapters below such a layer do not train.

Not supported, with an error that says what to take: packed int4 (its kernels are in mslk, for GPUs only), activations
in float8, static activations, and different configurations by module name (`FqnToConfig`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distquant.config import TorchaoConfig, torch_dtype
from distquant.config.frozen import thaw
from distquant.dtypes import STORED_NAMES
from distquant.errors import Problem
from distquant.quantization.registry import register
from distquant.quantization.scheme import Context, Stream
from distquant.quantization.weight_only import FLOATS, WeightOnlyScheme, wrong_dtypes
from distquant.sharding.layout import ALL, PLAIN_STEPS, Component, Layout
from distquant.sharding.shard import Shard
from distquant.sharding.tally import WHOLE_ROW

SCALE, ZERO = "_weight_scale", "_weight_zero_point"
AMAX = "amax"

INT8, FLOAT8, INTX = "Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor"
KINDS = {
    "Int8WeightOnlyConfig": INT8,
    "Int8DynamicActivationInt8WeightConfig": INT8,
    "Float8WeightOnlyConfig": FLOAT8,
    "IntxWeightOnlyConfig": INTX,
}
"""torchao's configuration -> its tensor."""

INSTEAD = {
    "Int4WeightOnlyConfig": "Give IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(128)), which runs "
    "everywhere, or another method of 4 bits: 'int4', 'nf4', 'quanto-int4'",
    "Float8DynamicActivationFloat8WeightConfig": "Give Float8WeightOnlyConfig of the same granularity: equal weights",
    "Int8StaticActivationInt8WeightConfig": "Give Int8WeightOnlyConfig: equal weights",
}
"""What to take in place of a configuration that cannot work here."""

UNKNOWN = ("act_pre_scale", "act_quant_scale", "act_quant_zero_point", "scale_and_zero", "per_tensor_scale")
"""Components of torchao's tensors that no configuration here has."""


@register
class TorchaoScheme(WeightOnlyScheme):
    """`nn.Linear` with a torchao tensor of local size; the component "" is `qdata`."""

    name = "torchao"
    config_class = TorchaoConfig
    requires: ClassVar[Mapping[str, str]] = {"torchao": "0.18"}
    suffixes: ClassVar[Mapping[str, str]] = {
        "_weight_qdata": "",
        SCALE: SCALE,
        ZERO: ZERO,
        **{f"_weight_{name}": f"_weight_{name}" for name in UNKNOWN},
    }
    unmoved: ClassVar[Mapping[str, str]] = {"disk": "torchao's tensors are objects of several tensors, not bytes"}
    config: TorchaoConfig

    # -- what the configuration means ------------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        """Which tensor weights become; `Int8Tensor` for configurations that `validate` refuses."""
        return KINDS.get(self.config.type_name, INT8)

    @cached_property
    def group(self) -> str | int:
        """Weights that share a scale: `"row"`, `"tensor"`, or as many of a row."""
        found = self.config.vocabulary()[0].group if self.config.type_name in KINDS else "row"
        return found if isinstance(found, int) or found == "tensor" else "row"

    @cached_property
    def codes_dtype(self) -> str:
        if self.kind != FLOAT8:
            return "int8"
        return str(self._field("weight_dtype", "float8_e4m3fn")).removeprefix("torch.")

    def _field(self, name: str, default: Any = None) -> Any:
        """A field of torchao's configuration; of serialized dtypes and enum members their value."""
        found = self.config.data.get(name, default)
        return found.get("_data", found) if isinstance(found, Mapping) else found

    @cached_property
    def torchao_config(self) -> Any:
        """torchao's own configuration object."""
        from torchao.core.config import config_from_dict

        return config_from_dict(thaw(self.config.quant_type)["default"])

    @property
    def granularity(self) -> Any:
        """torchao's granularity of weights."""
        found = self.torchao_config.granularity
        return found[-1] if isinstance(found, (list, tuple)) else found

    def validate(self, context: Context) -> list[Problem]:
        found = super().validate(context)
        where, name = "quantization_config.quant_type", self.config.type_name
        if name not in KINDS:
            fix = INSTEAD.get(name, f"Give one of {', '.join(KINDS)}")
            what = "its packed kernels are in mslk, for GPUs only" if name.startswith("Int4") else "is not supported"
            found.append(Problem(f"{where} {name}", what, fix))
        elif problem := self._refused_by_torchao():
            found.append(Problem(f"{where} {name}", problem, "Give what torchao's config_to_dict writes"))
        elif self.kind != INTX:
            along = _dim(self.config.data.get("granularity"))
            if along not in (-1, 1):
                what = f"PerRow({along}) has a scale for each input, that is for each column of the weight"
                found.append(Problem(f"{where} {name}.granularity", what, "Give PerRow(), one for each output"))
        else:
            for field, allowed in (("intx_choose_qparams_algorithm", "AFFINE"), ("scale_dtype", None)):
                if self._field(field, allowed) != allowed:
                    what = f"{self._field(field)!r} is not supported"
                    found.append(Problem(f"{where} {name}.{field}", what, f"Give {allowed or 'none'}"))
        for field in ("include_input_output_embeddings", "untie_embedding_weights"):
            if getattr(self.config, field):
                what = "embeddings are not quantized"
                found.append(Problem(f"quantization_config.{field}", what, "Leave it out"))
        return found

    def _refused_by_torchao(self) -> str | None:
        """Why torchao does not read the configuration; None where it does, or is not there to ask."""
        try:
            _ = self.torchao_config
        except ImportError:
            return None
        except (ValueError, TypeError, NotImplementedError) as error:
            return str(error)
        return None

    # -- layout ----------------------------------------------------------------------------------------------------

    def layout(self, name: str, shape: tuple[int, ...], dtype: str) -> Layout:
        group = self.group
        block_shape = (ALL, ALL) if group == "tensor" else (1, ALL if group == "row" else int(group))
        components = [
            Component(name="", dtype=self.codes_dtype, preferred_alignments=PLAIN_STEPS),
            Component(name=SCALE, dtype=dtype if self.kind == INTX else "float32", block_shape=block_shape),
        ]
        if self.kind != FLOAT8:
            components.append(Component(name=ZERO, dtype="int8", block_shape=block_shape))
        return Layout(tuple(components))

    def check_weight(self, name: str, shape: tuple[int, ...]) -> list[Problem]:
        if isinstance(self.group, int) and shape[-1] % self.group:
            what = f"its {shape[-1]} inputs are no multiple of torchao's group of {self.group}"
            return [Problem(name, what, "Give a group that divides them, PerRow(), or skip the module")]
        return []

    def check_stored(self, name: str, shape: tuple[int, ...], stored: dict[str, tuple[int, ...]]) -> list[Problem]:
        found = super().check_stored(name, shape, stored)
        for component in stored.keys() & {f"_weight_{name}" for name in UNKNOWN}:
            what = f"stores {component.removeprefix('_weight_')}, which {self.config.type_name} does not have"
            found.append(Problem(name, what, "Only weights without scales for activations can be loaded"))
        return found

    def check_dtypes(self, name: str, dtypes: dict[str, str]) -> list[Problem]:
        return wrong_dtypes(name, dtypes, {"": (STORED_NAMES[self.codes_dtype],), SCALE: FLOATS, ZERO: ("I8",)})

    def encoded_components(self, name: str, shape: tuple[int, int], dtype: str) -> tuple[Component, ...]:
        if self.group == "tensor":
            return Component(name="", dtype=dtype), Component(name=AMAX, dtype="float32", block_shape=(1, ALL))
        return super().encoded_components(name, shape, dtype)

    def replicated_components(self, shard: Shard) -> frozenset[str]:
        return frozenset((AMAX,)) if self.group == "tensor" else frozenset()

    # -- executing -------------------------------------------------------------------------------------------------

    def quantized(self, rows: Tensor) -> dict[str, Tensor]:
        """Components of a matrix of the load dtype, by torchao."""
        from torchao.quantization import Float8Tensor, Int8Tensor, IntxUnpackedToInt8Tensor
        from torchao.quantization.quantize_.common import KernelPreference

        config = self.torchao_config
        if self.kind == FLOAT8:
            # The same kernel everywhere: AUTO would take another library's where that is installed.
            kernel = KernelPreference.TORCH
            made = Float8Tensor.from_hp(rows, config.weight_dtype, self.granularity, kernel_preference=kernel)
            return {"": _without_nan(made.qdata, made.scale), SCALE: made.scale}
        if self.kind == INT8:
            reduced = bool(getattr(config, "reduce_range", False))
            made = Int8Tensor.from_hp(rows, self.granularity, reduce_range=reduced)
        else:
            block = (1, rows.shape[1] if self.group == "row" else self.group)
            made = IntxUnpackedToInt8Tensor.from_hp(rows, block, config.weight_dtype, mapping_type=config.mapping_type)
        return {"": made.qdata, SCALE: made.scale, ZERO: made.zero_point}

    def encode(self, name: str, rows: Tensor, out: dict[str, Tensor], ops: Any) -> None:
        if self.group == "tensor":
            found = {"": rows, AMAX: ops.block_amax(rows, (1, None))}
        elif self.group == "row" and self.kind in (FLOAT8, INT8):
            self._encode_rows(rows, out[""].view(rows.shape), out[SCALE].view(-1, 1), ops)
            found = {ZERO: torch.zeros_like(out[ZERO])} if ZERO in out else {}
        else:
            found = self.quantized(rows.contiguous())
        for component, values in found.items():
            out[component].view(values.shape).copy_(values)

    def _encode_rows(self, rows: Tensor, codes: Tensor, scales: Tensor, ops: Any) -> None:
        """Fills codes `[rows, columns]` and scales, float32 `[rows, 1]`, of rows with a scale each.

        The bits of `Float8Tensor.from_hp` and `Int8Tensor.from_hp` of torchao 0.18 (`_choose_scale_float8` and
        `_quantize_affine_float8`, `choose_qparams_affine` and `quantize_affine` in `quantization/quant_primitives.py`):
        scales are computed in the weight's dtype, quotients in float32.
        """
        extreme = ops.block_amax(rows, (1, None)).to(rows.dtype)
        if self.kind == FLOAT8:
            scales.copy_(extreme / torch.finfo(codes.dtype).max)
            ops.encode_scaled_rows(rows, scales, codes.dtype, codes=codes)
            return
        half = 2 if getattr(self.torchao_config, "reduce_range", False) else 1
        low, high = -128 // half, 127 // half
        smallest = torch.finfo(torch.float32).eps
        scales.copy_((extreme / ((high - low) / 2)).clamp_(min=smallest))
        ops.encode_scaled_rows(rows, scales, codes.dtype, inverse=True, low=low, high=high, codes=codes)

    def pack(self, shard: Shard, parts: dict[str, Tensor], ops: Any) -> dict[str, Tensor]:
        if self.group != "tensor":
            return self.shaped(shard, parts)
        # torchao takes the scale from what it quantizes, so a row with the whole weight's extreme goes along.
        local = parts[""].view(shard.local_shape)
        extreme = torch.zeros_like(local[:1])
        extreme[0, 0] = parts[AMAX].max()
        found = self.quantized(torch.cat((local, extreme)))
        return {**found, "": found[""][:-1].clone()}

    def module(self, linear: nn.Module, shard: Shard) -> nn.Module:
        out_features, in_features = shard.local_shape
        module = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=torch_dtype(shard.dtype))
        module.register_parameter("bias", linear.bias)  # type: ignore[arg-type]
        return module

    def load_encoded(self, shard: Shard, module: nn.Module, parts: dict[str, Tensor], ops: Any) -> None:
        self._place(shard, module, self.pack(shard, parts, ops))

    def load_prequantized(
        self, shard: Shard, module: nn.Module, parts: dict[str, Tensor], whole: frozenset[str]
    ) -> None:
        self._place(shard, module, self.pack_prequantized(shard, parts, whole))

    def pack_prequantized(self, shard: Shard, parts: dict[str, Tensor], whole: frozenset[str]) -> dict[str, Tensor]:
        found = self.shaped(shard, parts)
        if self.kind == INTX:
            found[SCALE] = found[SCALE].to(torch_dtype(shard.dtype))
        return found

    def _place(self, shard: Shard, module: nn.Module, found: Mapping[str, Tensor]) -> None:
        """Puts components of local shapes into the module, as torchao's tensor."""
        module.weight = nn.Parameter(self.tensor(shard, found), requires_grad=False)

    def tensor(self, shard: Shard, found: Mapping[str, Tensor]) -> Tensor:
        """torchao's tensor of a shard, as its own `quantize_` would have built it."""
        from torchao.quantization import Float8Tensor, Int8Tensor, IntxUnpackedToInt8Tensor
        from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

        config, dtype = self.torchao_config, torch_dtype(shard.dtype)
        rows, columns = shard.local_shape
        block = [rows, columns] if self.group == "tensor" else [1, columns if self.group == "row" else int(self.group)]
        if self.kind == FLOAT8:
            return Float8Tensor(found[""], found[SCALE], block_size=block, dtype=dtype)
        if self.kind == INTX:
            target = config.weight_dtype
            return IntxUnpackedToInt8Tensor(found[""], found[SCALE], found[ZERO], target, tuple(block), dtype, None)
        activations, reduced = None, False
        if self.config.type_name == "Int8DynamicActivationInt8WeightConfig":
            of_activations = config.granularity
            of_activations = of_activations[0] if isinstance(of_activations, (list, tuple)) else of_activations
            reduced = bool(config.reduce_range)
            activations = QuantizeTensorToInt8Kwargs(of_activations, config.act_mapping_type, reduced)
        return Int8Tensor(
            found[""],
            found[SCALE],
            block,
            dtype,
            zero_point=found[ZERO],
            act_quant_kwargs=activations,
            reduce_range=reduced,
        )

    # -- looking at it ---------------------------------------------------------------------------------------------

    def components(self, module: Any) -> dict[str, Tensor]:
        """What a filled module stores."""
        weight = module.weight
        found = {"": weight.qdata, SCALE: weight.scale}
        return found if self.kind == FLOAT8 else {**found, ZERO: weight.zero_point}

    def dequantize(self, shard: Shard, components: Mapping[str, Tensor], dtype: torch.dtype, ops: Any) -> Tensor:
        made: Any = self.tensor(shard, components)
        return made.dequantize().to(dtype)

    def fingerprint_streams(self, shard: Shard, components: Mapping[str, Tensor]) -> Iterable[Stream]:
        yield "code", components[""], 1
        span = self.group if isinstance(self.group, int) else WHOLE_ROW
        for stream, name in (("scale", SCALE), ("zero", ZERO)):
            if name in components:
                values = components[name]
                yield stream, values.expand(shard.local_shape[0], values.shape[1]), span

    def finish_model(self, model: Any) -> None:
        """What `from_pretrained` leaves, so that `save_pretrained` and PEFT treat the model alike."""
        from transformers.quantizers import AutoHfQuantizer

        super().finish_model(model)
        config = model.config.quantization_config
        if self.config.include_modules is not None or self.config.layers is not None:
            # transformers knows only what to skip, so name every linear that was left alone.
            linears = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
            config.modules_to_not_convert = [n for n, module in linears if not hasattr(module.weight, "qdata")]
        model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)


def _dim(granularity: Any) -> int:
    """The dim that a serialized granularity reduces over, of weights where there are two; the last by default."""
    found = granularity[-1] if isinstance(granularity, tuple) else granularity
    fields = found.get("_data") if isinstance(found, Mapping) else None
    return int(fields.get("dim", -1)) if isinstance(fields, Mapping) else -1


def _without_nan(codes: Tensor, scale: Tensor) -> Tensor:
    """float8 codes `[rows, columns]`, zeros where the scale (`[rows or 1, groups]`) is zero."""
    empty = scale == 0
    if not bool(empty.any()):
        return codes
    spread = empty.repeat_interleave(codes.shape[1] // empty.shape[1], 1).expand(codes.shape)
    return codes.view(torch.uint8).masked_fill(spread, 0).view(codes.dtype)
