"""The base of both bitsandbytes methods: package, device maps, memory, and the mark that others look for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from distquant.config import Bnb4bitConfig, Bnb8bitConfig
from distquant.errors import Problem
from distquant.quantization.codec import Encoder
from distquant.quantization.quantized_scheme import QuantizedScheme
from distquant.quantization.scheme import Context
from distquant.quantization.weight_only import carry_unused
from distquant.sharding.device_map import place_of


class BitsandbytesScheme(QuantizedScheme, Encoder):
    """Rules of both: device maps, memory, and the mark that PEFT and transformers look for."""

    requires: ClassVar[Mapping[str, str]] = {"bitsandbytes": "0.50"}  # older ones nest absmax into other bits
    by_bitsandbytes: ClassVar[bool] = True
    stacks: ClassVar[bool] = True
    unmoved: ClassVar[Mapping[str, str]] = {}  # offloaded modules are left unquantized, see `offloaded`
    mark: ClassVar[str]
    config: Bnb4bitConfig | Bnb8bitConfig

    def validate(self, context: Context) -> list[Problem]:
        problems = super().validate(context)
        places = set((context.device_map or {}).values())
        offloaded = sorted(places & {"cpu", "disk"})
        if offloaded and places != {"cpu"} and not self.config.llm_int8_enable_fp32_cpu_offload:
            fault = f"modules on {' and '.join(offloaded)} beside other devices stay unquantized with bitsandbytes"
            fix = "Set llm_int8_enable_fp32_cpu_offload=True to allow that, or map everything to one kind of device"
            problems.append(Problem("device_map", fault, fix))
        return problems

    def offloaded(self, converted: Iterable[str], device_map: Mapping[str, str]) -> set[str]:
        """Modules on CPU or disk beside other devices, where that is allowed (transformers keeps them in 16 bits)."""
        if not self.config.llm_int8_enable_fp32_cpu_offload or set(device_map.values()) == {"cpu"}:
            return set()
        return {name for name in converted if place_of(device_map, name) in ("cpu", "disk")}

    def adjust_max_memory(self, max_memory: int) -> int:
        """Leaves a tenth for what quantization needs beside the weights, as transformers does."""
        return int(max_memory * 0.9)

    def finish_model(self, model: Any) -> None:
        """Sets what `from_pretrained` leaves, so that PEFT and `save_pretrained` treat the model alike."""
        from transformers import BitsAndBytesConfig
        from transformers.quantizers import AutoHfQuantizer

        config = BitsAndBytesConfig.from_dict(self.config.to_dict())
        carry_unused(self.config, config)
        left = self.left_out(model)
        config.llm_int8_skip_modules = config.llm_int8_skip_modules if left is None else left
        model.config.quantization_config = config
        model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
        model.is_quantized, model.quantization_method = True, config.quant_method
        setattr(model, self.mark, True)
