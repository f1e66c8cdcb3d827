"""The tensors that a module stores, of which its size is the sum."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def state_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields what `state_dict` lists, without the mark that bitsandbytes' int8 modules leave there."""
    for name, value in module.state_dict().items():
        if is_traceable_wrapper_subclass(value):  # torchao's; its size would be that of what it stands for
            yield from ((f"{name}.{inner}", getattr(value, inner)) for inner in value.__tensor_flatten__()[0])
        elif not name.endswith("weight_format"):
            yield name, value
