"""The second interface of a method: what its stored components mean. It knows no module.

A rank stores a dict of components, component -> local tensor. `pack` and `pack_prequantized` make it, `dequantize` and
`fingerprint_streams` read it. Experts are kept as stacks of such components, so they need nothing else.

Abilities that only some methods have are interfaces of their own: `Encoder` and `PlainDecoder`. Callers ask with
`isinstance`, and a method that lacks one has no stub of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

from distquant.kernels.protocol import Kernels
from distquant.sharding.shard import Shard

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from distquant.quantization.stored_values import Check

Stream = tuple[str, "Tensor", int]
"""A stream of the fingerprint: its name, values `[local rows, ceil(local columns / width)]`, and the width: columns
that one value stands for."""


class Codec(ABC):
    """Packs and reads the stored components of a rank's shard."""

    value_checks: ClassVar[Mapping[str, Check]] = {}
    """Stored component -> check of its values, which a load runs as soon as they are there; see `stored_values.py`."""

    statistics_on_host: ClassVar[bool] = False
    """True if `pack` also takes `replicated_components` in pinned host memory, which is used again when it returns and
    all that it has queued is done."""

    def value_check(self, name: str, component: str) -> Check | None:
        """The check of a component of the parameter of this name; None where any value is legal."""
        return self.value_checks.get(component)

    @abstractmethod
    def pack(self, shard: Shard, parts: dict[str, Tensor], ops: Kernels) -> dict[str, Tensor]:
        """Makes the stored local components of what `Encoder.encode` has filled.

        Args:
            shard: this rank's part.
            parts: component -> what the shard keeps of it, flat, rows in local order; of `replicated_components` all
                of the whole weight. On the device; the memory is the callee's to keep.
            ops: kernels, a module like `distquant.kernels.reference`.
        """

    @abstractmethod
    def pack_prequantized(
        self, shard: Shard, parts: dict[str, Tensor], replicated: frozenset[str]
    ) -> dict[str, Tensor]:
        """Makes the stored local components of those of a pre-quantized weight, and checks their values.

        Args:
            shard: this rank's part.
            parts: stored component -> what the shard keeps of it, flat, in the stored dtype, on the device.
            replicated: components of which `parts` has all elements: the layout does not know them, or the partition
                does not fall between their elements.

        Raises:
            InputError: stored values contradict the configuration.
        """

    @abstractmethod
    def dequantize(self, shard: Shard, components: Mapping[str, Tensor], dtype: torch.dtype, ops: Kernels) -> Tensor:
        """Computes the weight, `dtype` `shard.local_shape`, from its stored local components."""

    @abstractmethod
    def fingerprint_streams(self, shard: Shard, components: Mapping[str, Tensor]) -> Iterable[Stream]:
        """Yields what the fingerprint counts: unpacked codes, and scales and zeros as the kernel uses them."""


class Encoder(ABC):
    """Quantizes the rows of an unquantized checkpoint."""

    @abstractmethod
    def encode(self, name: str, rows: Tensor, out: dict[str, Tensor], ops: Kernels) -> None:
        """Quantizes consecutive rows of a weight.

        Args:
            name: the parameter's.
            rows: `[n, columns]` in the load dtype: all columns, or a run of them that starts and ends with every
                component's elements. `n` is a multiple of the rows of a component's block, except at the weight's end.
            out: component of `encoded_components` -> memory to fill, flat, in row order.
            ops: kernels, a module like `distquant.kernels.reference`.
        """


class PlainDecoder(ABC):
    """Decodes parameters that stay unquantized in the model and are stored in another form."""

    @abstractmethod
    def decode(self, name: str, rows: Tensor, out: dict[str, Tensor], ops: Kernels) -> None:
        """Makes plain values (`out[""]`, flat) of whole rows as they are stored, `plain_row_block` rows at a time."""
