"""Loads models of methods that distquant does not shard: transformers does, with its own quantizer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from distquant.errors import InputError
from distquant.model import model_file_problems
from distquant.planning.load_plan import LoadPlan
from distquant.process_state import changing_process_state
from distquant.quantization import Scheme

REFUSALS = (ImportError, RuntimeError, TypeError, ValueError)
"""Errors of transformers' quantizers where they cannot work."""


@changing_process_state()
def load(plan: LoadPlan, scheme: Scheme, device: torch.device) -> Any:
    """Returns the complete model on one device, or on those of the plan's device map, in eval mode.

    Errors after transformers' quantizer has accepted the configuration are raised as they are.

    Raises:
        InputError: that quantizer rejects the configuration, the packages or the devices.
    """
    import transformers

    if problems := list(model_file_problems(Path(plan.model), weights=True)):
        raise InputError(problems)
    source: dict[str, Any] = {"trust_remote_code": plan.trust_remote_code, "local_files_only": True}
    device_map = plan.device_map or {"": str(device)}
    config = transformers.AutoConfig.from_pretrained(plan.model, **source)
    if plan.attn_implementation is not None:
        source["attn_implementation"] = plan.attn_implementation
    extra = _accepted(plan, scheme, config, device_map)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        plan.model, dtype=getattr(torch, plan.dtype), device_map=device_map, **source, **extra
    )
    return model.eval()


def _accepted(plan: LoadPlan, scheme: Scheme, config: Any, device_map: dict[str, str]) -> dict[str, Any]:
    """Returns the `quantization_config` for `from_pretrained`, if any, once the quantizer has checked it.

    The check is transformers' own, `quantizers/auto.py::get_hf_quantizer`, with which `from_pretrained` begins; it
    writes into the configurations that it gets, so it gets the throwaway `config` and a copy.
    """
    from transformers.quantizers.auto import AutoQuantizationConfig, get_hf_quantizer

    given: dict[str, Any] = {}
    try:
        # An explicit None would switch the checkpoint's own quantization off.
        if not plan.prequantized or scheme.config.to_diff_dict().keys() & scheme.config.loading_attributes:
            given["quantization_config"] = AutoQuantizationConfig.from_dict(plan.quantization_config)
        get_hf_quantizer(config, copy.deepcopy(given.get("quantization_config")), dict(device_map), True, {})
    except REFUSALS as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        method = scheme.config.quant_method
        fix = f"Install what it asks for, or take another method than {method!r}"
        raise InputError.one("quantization_config", f"transformers refuses {method!r}: {first}", fix) from error
    return given
