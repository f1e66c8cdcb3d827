"""Models of methods that distquant does not cut: transformers loads them with its own quantizer."""

from __future__ import annotations

from typing import Any

import torch

from distquant.errors import InputError
from distquant.planning.load_plan import LoadPlan
from distquant.schemes import Scheme

REFUSALS = (ImportError, ValueError, NotImplementedError, TypeError)
"""What a quantizer of transformers raises where it cannot work, before it touches a weight."""


def load(plan: LoadPlan, scheme: Scheme, device: torch.device) -> Any:
    """The whole model on one device, or over those of the plan's device map, in eval mode.

    Raises:
        InputError: transformers' own quantizer refuses the configuration, the packages or the device.
    """
    import transformers
    from transformers.quantizers.auto import AutoQuantizationConfig

    given: dict[str, Any] = {}
    try:
        if not plan.prequantized or scheme.config.to_diff_dict().keys() & scheme.config.loading_attributes:
            given["quantization_config"] = AutoQuantizationConfig.from_dict(plan.quantization_config)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            plan.model,
            dtype=getattr(torch, plan.dtype),
            device_map=plan.device_map or {"": str(device)},
            trust_remote_code=plan.trust_remote_code,
            local_files_only=True,
            **given,
        )
    except REFUSALS as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        method = scheme.config.quant_method
        fix = f"Install what it asks for, or take another method than {method!r}"
        raise InputError.one("quantization_config", f"transformers refuses {method!r}: {first}", fix) from error
    return model.eval()
