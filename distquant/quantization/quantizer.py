"""The `hf_quantizer` of a model that transformers did not quantize, for Trainer, PEFT and accelerate.

Models of bitsandbytes and torchao have transformers' own. For other methods its answers are about other modules, for
instance that MXFP4 does not train; so they have this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.quantizers.base import HfQuantizer


class Quantizer(HfQuantizer):
    """Answers for modules that dequantize and multiply: adapters on them train, their weights do not.

    Args:
        config: the configuration as the model carries it.
        serializable: True if `from_pretrained` reads what `save_pretrained` writes.
    """

    def __init__(self, config: Any, serializable: bool):
        super().__init__(config, pre_quantized=True)
        self._serializable = serializable
        self.state_dict: Mapping[str, Tensor] | None = None
        """Tensors that `save_pretrained` writes, where a model cannot give them itself; None = its own."""

    def is_serializable(self) -> bool:
        return self._serializable

    def get_state_dict_and_metadata(self, model: Any) -> tuple[Any, dict[str, str]]:
        """`save_pretrained` takes these tensors in place of those that it was given."""
        return self.state_dict, {}

    @property
    def is_trainable(self) -> bool:
        return True
