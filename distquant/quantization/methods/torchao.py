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
for the whole tensor needs all rows first: they are passed on in 16 bits beside each row's largest magnitude, and are
quantized by the ranks that keep them.

One difference: rows of zeros have scale 0 in `Float8Tensor`, and upstream's codes are then 0/0, NaN; here they are
zeros.

Checkpoints are those of `torchao.prototype.safetensors` as transformers 5.23 writes them: `<module>._weight_qdata` and
so on, with the tensors' attributes as JSON in the header's `__metadata__`. All of these follow from the configuration
and the shape, so the metadata is not needed.

With int8 activations (`Int8DynamicActivationInt8WeightConfig`) a row-parallel shard quantizes its own part of each
activation, as LLM.int8 does, and torchao gives no gradient to the inputs: adapters below such a layer do not train.

Not supported, with an error that names the alternative: packed int4 (its kernels are in mslk, for GPUs only),
activations in float8, static activations, and different configurations by module name (`FqnToConfig`).
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
from distquant.errors import RAISED_BY_LIBRARIES, Problem, one_line
from distquant.kernels.protocol import Kernels
from distquant.quantization.codec import Encoder, Stream
from distquant.quantization.linear.torchao_tensors import FLOAT8, INT8, INTX, SCALE, ZERO, TorchaoTensors
from distquant.quantization.registry import register
from distquant.quantization.scheme import Context
from distquant.quantization.stored_checks import SCALE_DTYPES, wrong_dtypes
from distquant.quantization.stored_values import MAGNITUDES, Check, Integers, integers_of
from distquant.quantization.weight_only import WeightOnlyScheme
from distquant.sharding.layout import ALL, PLAIN_STEPS, Component, Layout
from distquant.sharding.shard import Shard
from distquant.sharding.tally import WHOLE_ROW

AMAX = "amax"

TENSOR_OF_CONFIG = {
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
"""Configuration that cannot work here -> its alternative."""

UNKNOWN = ("act_pre_scale", "act_quant_scale", "act_quant_zero_point", "scale_and_zero", "per_tensor_scale")
"""Components of torchao's tensors that no configuration here has."""


@register
class TorchaoScheme(WeightOnlyScheme, Encoder):
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
    form_fields: ClassVar[frozenset[str]] = frozenset({"quant_type"})
    unmoved: ClassVar[Mapping[str, str]] = {"disk": "torchao's tensors are objects of several tensors, not bytes"}
    config: TorchaoConfig

    # -- the configuration -----------------------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        """The tensor class of weights; `Int8Tensor` for configurations that `validate` reports."""
        return TENSOR_OF_CONFIG.get(self.config.type_name, INT8)

    @cached_property
    def group(self) -> str | int:
        """Weights that share a scale: `"row"`, `"tensor"`, or as many of a row."""
        group = self.config.vocabulary()[0].group if self.config.type_name in TENSOR_OF_CONFIG else "row"
        return group if isinstance(group, int) or group == "tensor" else "row"

    @cached_property
    def codes_dtype(self) -> str:
        """torch's name of the dtype that holds codes."""
        if self.kind != FLOAT8:
            return "int8"
        return str(self._field("weight_dtype", "float8_e4m3fn")).removeprefix("torch.")

    def _field(self, name: str, default: Any = None) -> Any:
        """A field of torchao's configuration; of serialized dtypes and enum members their value."""
        value = self.config.data.get(name, default)
        return value.get("_data", value) if isinstance(value, Mapping) else value

    @cached_property
    def torchao_config(self) -> Any:
        """torchao's own configuration object."""
        from torchao.core.config import config_from_dict

        return config_from_dict(thaw(self.config.quant_type)["default"])

    @cached_property
    def tensors(self) -> TorchaoTensors:
        """The maker of torchao's tensors."""
        return TorchaoTensors(self.torchao_config, self.kind, self.group)

    def validate(self, context: Context) -> list[Problem]:
        problems = super().validate(context)
        where, name = "quantization_config.quant_type", self.config.type_name
        if name not in TENSOR_OF_CONFIG:
            fix = INSTEAD.get(name, f"Give one of {', '.join(TENSOR_OF_CONFIG)}")
            fault = "its packed kernels are in mslk, for GPUs only" if name.startswith("Int4") else "is not supported"
            problems.append(Problem(f"{where} {name}", fault, fix))
        elif problem := self._torchao_error():
            problems.append(Problem(f"{where} {name}", problem, "Give what torchao's config_to_dict writes"))
        elif self.kind != INTX:
            along = _dim(self.config.data.get("granularity"))
            if along not in (-1, 1):
                fault = f"PerRow({along}) has a scale for each input, that is for each column of the weight"
                problems.append(Problem(f"{where} {name}.granularity", fault, "Give PerRow(), one for each output"))
        else:
            for field, allowed in (("intx_choose_qparams_algorithm", "AFFINE"), ("scale_dtype", None)):
                if self._field(field, allowed) != allowed:
                    fault = f"{self._field(field)!r} is not supported"
                    problems.append(Problem(f"{where} {name}.{field}", fault, f"Give {allowed or 'none'}"))
        for field in ("include_input_output_embeddings", "untie_embedding_weights"):
            if getattr(self.config, field):
                fault = "embeddings are not quantized"
                problems.append(Problem(f"quantization_config.{field}", fault, "Leave it out"))
        return problems

    def _torchao_error(self) -> str | None:
        """Reason why torchao does not read the configuration; None where it does, or is not installed."""
        try:
            _ = self.torchao_config
        except ImportError:
            return None
        except RAISED_BY_LIBRARIES as error:
            return one_line(error)
        return None

    # -- layout rules ----------------------------------------------------------------------------------------------

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

    def group_size(self, name: str, shape: tuple[int, ...]) -> int | None:
        return self.group if isinstance(self.group, int) else None

    def check_stored(self, name: str, shape: tuple[int, ...], stored: dict[str, tuple[int, ...]]) -> list[Problem]:
        problems = super().check_stored(name, shape, stored)
        for component in stored.keys() & {f"_weight_{name}" for name in UNKNOWN}:
            fault = f"stores {component.removeprefix('_weight_')}, which {self.config.type_name} does not have"
            problems.append(Problem(name, fault, "Only weights without scales for activations can be loaded"))
        return problems

    def check_dtypes(self, name: str, dtypes: dict[str, str]) -> list[Problem]:
        return wrong_dtypes(name, dtypes, {"": (STORED_NAMES[self.codes_dtype],), SCALE: SCALE_DTYPES, ZERO: ("I8",)})

    def encoded_components(self, name: str, shape: tuple[int, int], dtype: str) -> tuple[Component, ...]:
        if self.group == "tensor":
            return Component(name="", dtype=dtype), Component(name=AMAX, dtype="float32", block_shape=(1, ALL))
        return super().encoded_components(name, shape, dtype)

    def replicated_components(self, shard: Shard) -> frozenset[str]:
        return frozenset((AMAX,)) if self.group == "tensor" else frozenset()

    def value_check(self, name: str, component: str) -> Check | None:
        """Scales, zero points, and codes of fewer bits than their bytes have.

        torchao's products with `Int8Tensor` leave the zero point out, which its symmetric quantization stores as 0.
        """
        if component == SCALE:
            return MAGNITUDES
        if self.kind == INT8:
            return Integers(0, 0) if component == ZERO else None
        bits = self.config.vocabulary()[0].bits
        return integers_of(int(bits)) if self.kind == INTX and bits is not None and bits < 8 else None

    # -- codec -----------------------------------------------------------------------------------------------------

    def encode(self, name: str, rows: Tensor, out: dict[str, Tensor], ops: Kernels) -> None:
        if self.group == "tensor":
            components = {"": rows, AMAX: ops.block_amax(rows, (1, None))}
        elif self.group == "row" and self.kind in (FLOAT8, INT8):
            self.tensors.encode_rows(rows, out[""].view(rows.shape), out[SCALE].view(-1, 1), ops)
            components = {ZERO: torch.zeros_like(out[ZERO])} if ZERO in out else {}
        else:
            components = self.tensors.quantize(rows.contiguous())
        for component, values in components.items():
            out[component].view(values.shape).copy_(values)

    def pack(self, shard: Shard, parts: dict[str, Tensor], ops: Kernels) -> dict[str, Tensor]:
        if self.group != "tensor":
            return self.shaped(shard, parts)
        # torchao takes the scale from what it quantizes, so a row with the whole weight's extreme goes along.
        local = parts[""].view(shard.local_shape)
        extreme = torch.zeros_like(local[:1])
        extreme[0, 0] = parts[AMAX].max()
        components = self.tensors.quantize(torch.cat((local, extreme)))
        return {**components, "": components[""][:-1].clone()}

    def pack_prequantized(
        self, shard: Shard, parts: dict[str, Tensor], replicated: frozenset[str]
    ) -> dict[str, Tensor]:
        components = self.shaped(shard, parts)
        if self.kind == INTX:
            components[SCALE] = components[SCALE].to(torch_dtype(shard.dtype))
        return components

    def dequantize(self, shard: Shard, components: Mapping[str, Tensor], dtype: torch.dtype, ops: Kernels) -> Tensor:
        tensor: Any = self._tensor(shard, components)
        return tensor.dequantize().to(dtype)

    def _tensor(self, shard: Shard, components: Mapping[str, Tensor]) -> Tensor:
        return self.tensors.tensor(shard.local_shape, torch_dtype(shard.dtype), components)

    def fingerprint_streams(self, shard: Shard, components: Mapping[str, Tensor]) -> Iterable[Stream]:
        yield "code", components[""], 1
        width = self.group if isinstance(self.group, int) else WHOLE_ROW
        for stream, name in (("scale", SCALE), ("zero", ZERO)):
            if name in components:
                values = components[name]
                yield stream, values.expand(shard.local_shape[0], values.shape[1]), width

    # -- modules ---------------------------------------------------------------------------------------------------

    def module(self, linear: nn.Module, shard: Shard) -> nn.Module:
        out_features, in_features = shard.local_shape
        module = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=torch_dtype(shard.dtype))
        module.register_parameter("bias", linear.bias)  # type: ignore[arg-type]
        return module

    def fill(self, shard: Shard, module: Any, components: Mapping[str, Tensor]) -> None:
        module.weight = nn.Parameter(self._tensor(shard, components), requires_grad=False)

    def components(self, module: Any) -> dict[str, Tensor]:
        weight = module.weight
        components = {"": weight.qdata, SCALE: weight.scale}
        return components if self.kind == FLOAT8 else {**components, ZERO: weight.zero_point}

    def finish_model(self, model: Any) -> None:
        """Sets what `from_pretrained` leaves, so that `save_pretrained` and PEFT treat the model alike."""
        from transformers.quantizers import AutoHfQuantizer

        super().finish_model(model)
        config = model.config.quantization_config
        model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)


def _dim(granularity: Any) -> int:
    """The dim that a serialized granularity reduces over, of weights where there are two; the last by default."""
    of_weights = granularity[-1] if isinstance(granularity, tuple) else granularity
    fields = of_weights.get("_data") if isinstance(of_weights, Mapping) else None
    return int(fields.get("dim", -1)) if isinstance(fields, Mapping) else -1
