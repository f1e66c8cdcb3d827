"""The local module of methods that have none that runs everywhere: stored components, dequantized in forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from distquant.config import torch_dtype
from distquant.errors import DistquantError, InputError
from distquant.quantization.linear.dequant_matmul import dequant_matmul, ops_on
from distquant.quantization.linear.keeps_dtypes import KeepsDtypes
from distquant.quantization.public_names import PublicNames

if TYPE_CHECKING:
    from typing_extensions import Self

    from distquant.quantization.linear.gptqmodel_matmul import Kernel
    from distquant.quantization.weight_only import WeightOnlyScheme
    from distquant.sharding.shard import Shard


STORED_WEIGHT = "stored_weight"
"""Buffer of the component "": not `weight`, which is a property, and accelerate reads a buffer with `getattr`."""


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
        found = super().__torch_function__(func, types, args, kwargs or {})
        # A view through `data` or `detach` is refused likewise; results of arithmetic are ordinary tensors.
        views = name in ("__get__", "detach")
        return found if views or not isinstance(found, Computed) else found.as_subclass(Tensor)


class QuantizedLinear(PublicNames, KeepsDtypes, nn.Linear):
    """A linear layer of a shard's size that keeps a weight as its format stores it.

    Components are buffers under the names that the format's checkpoints use, but for "", which is `stored_weight` here
    and `weight` in the state dict. Gradients flow to the inputs (adapters
    train), never to the weight. `weight` is dequantized anew at every access, and cannot be written to.

    Args:
        scheme: what knows the format.
        shard: this rank's part; `shard.local_shape` is `[out_features, in_features]`.
        bias: the linear's own, or None.

    Attributes:
        float8: whether inputs are rounded to float8 and multiplied so (see `float8_matmul.py`).
        kernel: what multiplies inputs that need no gradient, if another library does (see `gptqmodel_product.py`).
        counted: what the fingerprint counts of the components, where the kernel has rearranged them and they are no
            longer here; then there is no `weight`, no state dict and no gradient.
    """

    _is_hf_initialized = True
    public_names: ClassVar[Mapping[str, str]] = {"weight": STORED_WEIGHT}

    def __init__(self, scheme: WeightOnlyScheme, shard: Shard, bias: nn.Parameter | None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = shard.local_shape
        self.scheme, self.shard, self.float8 = scheme, shard, False
        self.kernel: Kernel | None = None
        self.counted: list[int] | None = None
        self.register_parameter("bias", bias)

    def take(self, components: Mapping[str, Tensor]) -> None:
        """Holds these components from now on."""
        for name, value in components.items():
            self._buffers[name or STORED_WEIGHT] = value

    @property
    def components(self) -> dict[str, Tensor]:
        """What is stored, by component.

        Raises:
            InputError: the kernel has it, in its own order.
        """
        self._refuse_if_given()
        stored = ((name, value) for name, value in self._buffers.items() if value is not None)
        return {"" if name == STORED_WEIGHT else name: value for name, value in stored}

    def _refuse_if_given(self) -> None:
        """Raises `InputError` where the kernel has the components."""
        if self.counted is not None:
            what = f"{self.kernel} has rearranged the stored words for itself: they cannot be read, saved or trained on"
            raise InputError.one(self.shard.name, what, "Load with forward='auto' or 'dequantize' for that")

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """`[out, in]`, dequantized to the dtype that it was quantized from; what is written to it is refused."""
        return self.dequantized().as_subclass(Computed)

    def dequantized(self) -> Tensor:
        """`[out, in]`, as `weight`, and an ordinary tensor of its own memory."""
        found = self.components
        ops, dtype = ops_on(next(iter(found.values())).device), torch_dtype(self.shard.dtype)
        return self.scheme.dequantize(self.shard, found, dtype, ops)

    def give(self, lanes: list[int]) -> None:
        """Leaves the components to the kernel; `lanes` is what the fingerprint counts of them."""
        for name in self.components:
            self._buffers[name or STORED_WEIGHT] = None
        self.counted = lanes

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._refuse_if_given()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.kernel is not None and fn(torch.empty(0, device=self.kernel.device)).device != self.kernel.device:
            self._refuse_if_given()
            self.kernel = None  # it stays where it was made; from now on the weight is dequantized
        return super()._apply(fn, recurse)

    def _multiplied(self, x: Tensor) -> Tensor:
        return self.scheme.float8_matmul(self.shard, self.components, x)

    def _by(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """What multiplies without dequantizing."""
        if not x.numel():
            return None
        if self.kernel is not None and not (x.requires_grad and torch.is_grad_enabled()):
            return self.kernel
        return self._multiplied if self.float8 else None

    def forward(self, x: Tensor) -> Tensor:
        output = dequant_matmul(x, self.dequantized, self._by(x))
        return output if self.bias is None else output + self.bias.to(output.dtype)
