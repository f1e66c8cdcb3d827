"""What the two bitsandbytes schemes share: package, device maps, memory, and the mark that others look for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from distquant.config import Bnb4bitConfig, Bnb8bitConfig
from distquant.errors import Problem
from distquant.schemes.base import Context, Scheme

if TYPE_CHECKING:
    from torch import nn


class BitsandbytesScheme(Scheme):
    """Hooks of both: device maps, memory, and the mark that PEFT and transformers look for."""

    requires: ClassVar[Mapping[str, str]] = {"bitsandbytes": "0.46.1"}
    mark: ClassVar[str]
    config: Bnb4bitConfig | Bnb8bitConfig

    def validate(self, context: Context) -> list[Problem]:
        found = super().validate(context)
        places = set((context.device_map or {}).values())
        offloaded = sorted(places & {"cpu", "disk"})
        if offloaded and places != {"cpu"} and not self.config.llm_int8_enable_fp32_cpu_offload:
            what = f"modules on {' and '.join(offloaded)} beside other devices stay unquantized with bitsandbytes"
            fix = "Set llm_int8_enable_fp32_cpu_offload=True to allow that, or map everything to one kind of device"
            found.append(Problem("device_map", what, fix))
        return found

    def adjust_max_memory(self, max_memory: int) -> int:
        """A tenth is left for what quantization needs beside the weights, as transformers does."""
        return int(max_memory * 0.9)

    def finish_model(self, model: nn.Module) -> None:
        setattr(model, self.mark, True)
