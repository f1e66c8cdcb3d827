"""transformers and bitsandbytes as they are: the truth that loading is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from work import bnb

from distquant.kernels import reference

PREQUANTIZED = {
    "nf4": ("nf4", "uint8"),
    "nf4-dq": ("nf4-dq", "uint8"),
    "nf4-dq in bfloat16 words": ("nf4-dq", "bfloat16"),
    "fp4": ("fp4", "uint8"),
    "int8": ("int8", "uint8"),
}
"""How a checkpoint is saved quantized: short name and quant storage."""


def their_config(name: str, storage: str = "uint8") -> Any:
    """The `BitsAndBytesConfig` of a short name."""
    from transformers import BitsAndBytesConfig

    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(**{k: v for k, v in bnb(name, storage=storage).items() if k != "quant_method"})


def their_model(path: str, name: str = "none", storage: str = "uint8", dtype: Any = "auto") -> Any:
    """`AutoModelForCausalLM.from_pretrained` on one thread, without the repacking that the first forward would do."""
    from transformers import AutoModelForCausalLM

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # An explicit None would switch the checkpoint's own quantization off.
        config = {"quantization_config": their_config(name, storage)} if name != "none" else {}
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **config)
    finally:
        torch.set_num_threads(threads)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def quantized_modules(model: nn.Module) -> dict[str, Any]:
    """bitsandbytes' linears by path."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)}


def effective_absmax(module: Any) -> Tensor:
    """float32: the absmax that a `Linear4bit`'s kernel uses, un-nested."""
    state = module.weight.quant_state
    if not state.nested:
        return state.absmax
    second = state.state2
    return reference.dequantize_blockwise(state.absmax, second.absmax, second.code, second.blocksize) + state.offset
