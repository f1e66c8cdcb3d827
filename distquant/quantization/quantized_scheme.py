"""A method whose weights distquant quantizes and keeps: its three interfaces joined, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from distquant.config import torch_dtype
from distquant.kernels.protocol import Kernels
from distquant.quantization.codec import Codec, Encoder
from distquant.quantization.module_factory import ModuleFactory
from distquant.quantization.scheme import Scheme
from distquant.sharding.layout import Layout
from distquant.sharding.shard import Shard

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distquant.sharding.tally import Tally


class QuantizedScheme(Scheme, Codec, ModuleFactory):
    """Layout rules, codec and module factory of one method.

    A method writes `layout`, `dequantize` and `fingerprint_streams`, and `module`, `fill` and `components`. One that
    quantizes derives from `Encoder`, too.
    """

    @classmethod
    def quantizes(cls) -> bool:
        return issubclass(cls, Encoder)

    # -- components ------------------------------------------------------------------------------------------------

    def pack(self, shard: Shard, parts: dict[str, Tensor], ops: Kernels) -> dict[str, Tensor]:
        return self.shaped(shard, parts)

    def pack_prequantized(
        self, shard: Shard, parts: dict[str, Tensor], replicated: frozenset[str]
    ) -> dict[str, Tensor]:
        return self.shaped(shard, parts)

    def shaped(self, shard: Shard, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Flat components in the local shapes of the layout; those that the layout does not know are left out."""
        known = {component.name: component for component in self.local_layout(shard).components}
        return {
            name: value.view(known[name].shape(shard.local_shape)) for name, value in parts.items() if name in known
        }

    def local_layout(self, shard: Shard) -> Layout:
        """The layout that the shard's own components have."""
        return self.layout(shard.name, shard.local_shape, shard.dtype)

    # -- modules ---------------------------------------------------------------------------------------------------

    def load_encoded(self, shard: Shard, module: nn.Module, parts: dict[str, Tensor], ops: Kernels) -> None:
        """Fills `module` when all rows have been encoded; arguments as of `pack`."""
        self.fill(shard, module, self.pack(shard, parts, ops))

    def load_prequantized(
        self, shard: Shard, module: nn.Module, parts: dict[str, Tensor], replicated: frozenset[str]
    ) -> None:
        """Fills `module` from a pre-quantized weight; arguments as of `pack_prequantized`."""
        self.fill(shard, module, self.pack_prequantized(shard, parts, replicated))

    def dequantized(self, module: nn.Module, shard: Shard, ops: Kernels) -> Tensor:
        """The weight of a filled module, `[local out, local in]` in the dtype that it was quantized from."""
        return self.dequantize(shard, self.components(module), torch_dtype(shard.dtype), ops)

    def left_out(self, model: nn.Module) -> list[str] | None:
        """Names all linear modules that were left alone; None where the configuration says it by their own names.

        Other libraries know modules by the names that the model has, and know nothing of `include_modules`, `layers`
        and what files decide.
        """
        from torch import nn
        from transformers.quantizers.base import get_keys_to_not_convert

        linears = ((name, module) for name, module in model.named_modules() if type(module) is nn.Linear)
        left = [name for name, module in linears if not hasattr(module.weight, "qdata")]  # torchao's tensors
        config, selection = self.config, self.config.selection
        if config.skip_field is None:
            return None
        default = set(get_keys_to_not_convert(model)) if selection.skip is None else set()
        narrowed = config.include_modules is not None or config.layers is not None
        unlisted = any(selection.selects(name) and name not in default for name in left)
        return left if narrowed or unlisted else None

    def tally(self, module: nn.Module, shard: Shard, tally: Tally) -> None:
        """Adds the module's codes and scales, as its kernel uses them, to the fingerprint."""
        for stream, values, width in self.fingerprint_streams(shard, self.components(module)):
            tally.shard(stream, values, shard.shape, shard.shard_dim, shard.owned, span=width)
