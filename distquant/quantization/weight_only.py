"""The base of methods whose weights are kept as the format stores them and dequantized in forward.

Such a method declares its layout and how its components become a weight. Slices, sizes, the local module, the checks of
stored shapes and the load of pre-quantized checkpoints follow. A method that also quantizes is an `Encoder`, and has
its own `pack` where the encoded components are not yet the stored ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distquant.config import QuantizationConfig
from distquant.config.frozen import thaw
from distquant.errors import RAISED_BY_LIBRARIES, Problem, one_line
from distquant.quantization.linear.quantized_linear import QuantizedLinear
from distquant.quantization.quantized_scheme import QuantizedScheme
from distquant.quantization.stored_checks import lacks, misshapen
from distquant.sharding.shard import Shard


class WeightOnlyScheme(QuantizedScheme):
    """`QuantizedLinear` of local size. Components have the names of their checkpoints; "" is `weight`."""

    stacks: ClassVar[bool] = True
    unmoved: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def reads_stored(cls) -> bool:
        return True

    def check_stored(self, name: str, shape: tuple[int, ...], stored: dict[str, tuple[int, ...]]) -> list[Problem]:
        components = self.layout(name, shape, "float32").components
        missing = [component.name or "weight" for component in components if component.name not in stored]
        problems = [lacks(name, ", ".join(missing))] if missing else []
        for component in (component for component in components if component.name in stored):
            expected = component.shape(shape)
            if math.prod(stored[component.name]) != math.prod(expected):
                problems.append(misshapen(name, component.name, stored[component.name], expected))
        return problems

    def module(self, linear: Any, shard: Shard) -> nn.Module:
        module = QuantizedLinear(self, shard, linear.bias)
        module.take(
            {
                c.name: torch.empty(c.shape(shard.local_shape), dtype=getattr(torch, c.dtype), device="meta")
                for c in self.local_layout(shard).components
            }
        )
        return module

    def fill(self, shard: Shard, module: Any, components: Mapping[str, Tensor]) -> None:
        module.take(components)

    def components(self, module: Any) -> dict[str, Tensor]:
        return module.components

    def finish_model(self, model: Any) -> None:
        mark_quantized(model, self)


def carry_unused(ours: QuantizationConfig, theirs: Any) -> None:
    """Puts the keys of a checkpoint's configuration that are not used on transformers' object, which saves them."""
    for key in ours.unused_keys:
        if not hasattr(theirs, key):
            setattr(theirs, key, thaw(ours.recorded[key]))


def refused_config(config: QuantizationConfig) -> Iterator[Problem]:
    """Yields why transformers does not read a configuration, which a loaded model gets as transformers' own object.

    It has fields that are not used here, and so are not checked here: without this, a load would fail at its end.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig

    plain = {key: value for key, value in config.recorded.items() if "." not in key}
    written = replace(config, recorded=plain).to_dict()
    method = written["quant_method"]
    if not any(known == method or known.startswith(f"{method}_") for known in AUTO_QUANTIZATION_CONFIG_MAPPING):
        return  # bitsandbytes has an entry for 4 bits and one for 8
    try:
        AutoQuantizationConfig.from_dict(written)
    except ImportError:
        return  # what is not installed is reported by its name
    except RAISED_BY_LIBRARIES as error:
        fix = "Correct the quantization_config: of the checkpoint's config.json, or of your own"
        yield Problem("quantization_config", f"transformers does not read it ({one_line(error)})", fix)


def mark_quantized(model: Any, scheme: QuantizedScheme) -> None:
    """Sets what `from_pretrained` leaves on a quantized model, as far as transformers knows the method."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig

    from distquant.quantization.quantizer import Quantizer

    written = scheme.config.to_dict()
    left = scheme.left_out(model)
    if left is not None and scheme.config.skip_field in written:
        written[scheme.config.skip_field] = left
    if written.get("quant_method") in AUTO_QUANTIZATION_CONFIG_MAPPING:
        config = AutoQuantizationConfig.from_dict(written)
        carry_unused(scheme.config, config)
        model.config.quantization_config = config
        model.hf_quantizer = Quantizer(config, scheme.unsaved(model) is None)
        model.is_quantized, model.quantization_method = True, config.quant_method
