"""The local module of methods whose own module does not run everywhere: components, dequantized in forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from distquant.config import torch_dtype
from distquant.errors import DistquantError, InputError
from distquant.quantization.codec import Codec
from distquant.quantization.linear.dequant_matmul import dequant_matmul, ops_on
from distquant.quantization.linear.float8_matmul import Float8Multiplier
from distquant.quantization.linear.keeps_dtypes import KeepsDtypes
from distquant.quantization.public_names import PublicNames
from distquant.sharding.shard import Shard

if TYPE_CHECKING:
    from typing_extensions import Self


STORED_WEIGHT = "stored_weight"
"""Buffer of the component "": not `weight`, which is a property, and accelerate reads a buffer with `getattr`."""


class ForwardKernel(Protocol):
    """Another library's product with the weight of one module."""

    @property
    def device(self) -> torch.device:
        """The device that it runs on; it cannot be moved."""

    def __call__(self, x: Tensor) -> Tensor:
        """`x @ W.T` in the dtype of `x`, `[..., out]` from `[..., in]`."""


class WriteError(DistquantError, RuntimeError):
    """Something writes to a weight that is not stored."""


class Computed(Tensor):
    """A tensor that was computed from what is stored: it can be read, and writing to it raises instead of being lost.

    PEFT's `merge` adds an adapter to `weight.data`.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.__name__
        writes = name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__"))
        if args and isinstance(args[0], Computed) and (writes or (name.startswith("__i") and name != "__invert__")):
            raise WriteError(
                "this weight is computed from its quantized form at every access, and what is written to it would be "
                "lost. To merge adapters, load the model with dequantize=True"
            )
        result = super().__torch_function__(func, types, args, kwargs or {})
        # A view through `data` or `detach` is refused likewise; results of arithmetic are ordinary tensors.
        views = name in ("__get__", "detach")
        return result if views or not isinstance(result, Computed) else result.as_subclass(Tensor)


class QuantizedLinear(PublicNames, KeepsDtypes, nn.Linear):
    """A linear layer of a shard's size that keeps a weight as its format stores it.

    Components are buffers under the names that the format's checkpoints use, except "", which is `stored_weight` here
    and `weight` in the state dict. Gradients flow to the inputs (adapters train), never to the weight. `weight` is
    dequantized anew at every access, and cannot be written to.

    Args:
        scheme: the codec of the format.
        shard: this rank's part; `shard.local_shape` is `[out_features, in_features]`.
        bias: the linear's own, or None.

    Attributes:
        float8: True if inputs are rounded to float8 and multiplied so (see `float8_matmul.py`).
        kernel: another library's product for inputs that need no gradient (see `gptqmodel_matmul.py`).
        counted: the fingerprint's count of the components, where the kernel has rearranged them and holds
            them alone; then there is no `weight`, no state dict and no gradient.
    """

    _is_hf_initialized = True
    public_names: ClassVar[Mapping[str, str]] = {"weight": STORED_WEIGHT}

    def __init__(self, scheme: Codec, shard: Shard, bias: nn.Parameter | None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = shard.local_shape
        self.scheme, self.shard, self.float8 = scheme, shard, False
        self.kernel: ForwardKernel | None = None
        self.counted: list[int] | None = None
        self.register_parameter("bias", bias)

    def take(self, components: Mapping[str, Tensor]) -> None:
        """Holds these components from now on."""
        for name, value in components.items():
            self._buffers[name or STORED_WEIGHT] = value

    @property
    def components(self) -> dict[str, Tensor]:
        """Stored tensors by component.

        Raises:
            InputError: the kernel has it, in its own order.
        """
        self._check_not_given()
        stored = ((name, value) for name, value in self._buffers.items() if value is not None)
        return {"" if name == STORED_WEIGHT else name: value for name, value in stored}

    def _check_not_given(self) -> None:
        """Raises `InputError` where the kernel has the components."""
        if self.counted is not None:
            fault = (
                f"{self.kernel} has rearranged the stored words for itself: they cannot be read, saved or trained on"
            )
            raise InputError.one(self.shard.name, fault, "Load with forward='auto' or 'dequantize' for that")

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """`[out, in]`, dequantized to the dtype that it was quantized from; writing to it raises `WriteError`."""
        return self.dequantized().as_subclass(Computed)

    def dequantized(self) -> Tensor:
        """`[out, in]`, as `weight`, and an ordinary tensor of its own memory."""
        components = self.components
        ops, dtype = ops_on(next(iter(components.values())).device), torch_dtype(self.shard.dtype)
        return self.scheme.dequantize(self.shard, components, dtype, ops)

    def give(self, lanes: list[int]) -> None:
        """Leaves the components to the kernel; `lanes` is their count in the fingerprint."""
        for name in self.components:
            self._buffers[name or STORED_WEIGHT] = None
        self.counted = lanes

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._check_not_given()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.kernel is not None and fn(torch.empty(0, device=self.kernel.device)).device != self.kernel.device:
            self._check_not_given()
            self.kernel = None  # it cannot be moved: from now on the weight is dequantized
        return super()._apply(fn, recurse)

    def _float8_matmul(self, x: Tensor) -> Tensor:
        assert isinstance(self.scheme, Float8Multiplier)
        return self.scheme.float8_matmul(self.shard, self.components, x)

    def _product_for(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The product that needs no dequantized weight, where there is one for these inputs."""
        if not x.numel():
            return None
        # Kernels have no backward: inputs that need a gradient go through the dequantized weight.
        if self.kernel is not None and not (x.requires_grad and torch.is_grad_enabled()):
            return self.kernel
        return self._float8_matmul if self.float8 else None

    def forward(self, x: Tensor) -> Tensor:
        output = dequant_matmul(x, self.dequantized, self._product_for(x))
        return output if self.bias is None else output + self.bias.to(output.dtype)
