"""The contribution of a quantization method: configuration, layout, hooks for the planner, execution and module.

The planner calls the hooks on the coordinator, where there is no device and no weight. Of the ranks, the one that reads
rows calls `encode` with all their columns. Its layout splits the result, and every rank that keeps a part calls
`load_encoded` with it (or `load_prequantized`, with what a checkpoint stores). A method that needs slicing code of its
own lacks a word in `layout`.

What a rank stores is a dict of components, and four functions speak of it without a module: `pack` and
`pack_prequantized` make it, `dequantize` and `fingerprint_streams` read it. Experts are kept as stacks of such
components, so a method holds them by these four alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from packaging.version import Version

from distquant.config import QuantizationConfig, torch_dtype
from distquant.environment import Environment
from distquant.errors import Problem
from distquant.model.description import ModelDescription
from distquant.quantization.linear.float8_matmul import Float8Kernel
from distquant.quantization.linear.state import state_of
from distquant.sharding.layout import Component, Layout
from distquant.sharding.mesh import Mesh
from distquant.sharding.shard import Shard

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from distquant.sharding.tally import Tally

Stream = tuple[str, "Tensor", int]
"""What the fingerprint counts: its name, values `[local rows, ceil(local columns / span)]`, and the span."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What `Scheme.validate` may look at."""

    environment: Environment
    mesh: Mesh
    description: ModelDescription
    device_map: Mapping[str, str] | None
    prequantized: bool


class Scheme(ABC):
    """Base of every quantization method."""

    name: ClassVar[str]
    """Registry name; also `TensorPlan.scheme`."""
    config_class: ClassVar[type[QuantizationConfig]]
    requires: ClassVar[Mapping[str, str]] = {}
    """Package -> minimum version; "0" = any."""
    min_capability: ClassVar[tuple[int, int] | None] = None
    """Least CUDA compute capability; None = any."""
    delegated: ClassVar[bool] = False
    """Whether transformers loads the model with its own quantizer."""
    suffixes: ClassVar[Mapping[str, str]] = {}
    """How checkpoints name the components beside `<module>.weight`: suffix after `<module>.` -> component."""
    fused_suffixes: ClassVar[Mapping[str, str]] = {}
    """The same beside a parameter of fused experts: what is glued to its name, such as `_scales`."""
    unsliced: ClassVar[frozenset[str]] = frozenset()
    """Components of stored weights that have no slice for a slice of the weight, and so go whole to every rank."""
    by_bitsandbytes: ClassVar[bool] = False
    """Whether the library bitsandbytes has kernels for it."""
    stacks: ClassVar[bool] = False
    """Whether experts can be kept in it: it has the four functions of stored components, and the components of equal
    shards have equal names, shapes and dtypes."""
    unmoved: ClassVar[Mapping[str, str]] = dict.fromkeys(("cpu", "disk"), "hooks are not known to move its modules")
    """Places from which its modules cannot be moved for each forward, `cpu` (beside other devices) or `disk` -> why."""
    constants: ClassVar[frozenset[str]] = frozenset()
    """Entries of a module's `state_dict` that say how it is stored; reports do not count them as weights."""

    def __init__(self, config: QuantizationConfig):
        self.config = config

    # -- deciding (coordinator) ------------------------------------------------------------------------------------

    def validate(self, context: Context) -> list[Problem]:
        """Everything that keeps the method from working there; packages and capability are checked here."""
        found = []
        for package, minimum in self.requires.items():
            have = context.environment.packages.get(package)
            if have is None or Version(have) < Version(minimum):
                any_version = Version(minimum) == Version("0")
                what = f"{package} {have}" if have else f"{package} is not installed"
                what += f", {self.name} needs it" if any_version else f", {self.name} needs {minimum} or newer"
                wanted = package if any_version else f"{package}>={minimum}"
                found.append(Problem("environment", what, f"Run: pip install '{wanted}'"))
        capability = context.environment.capability
        if self.min_capability and capability and capability < self.min_capability:
            have, need = (".".join(map(str, c)) for c in (capability, self.min_capability))
            found.append(
                Problem("environment", f"compute capability {have}, {self.name} needs {need}", "Use a newer GPU")
            )
        return found

    def float8_kernel(self, name: str) -> Float8Kernel | None:
        """What could multiply a parameter in float8, where its method means inputs to be float8, too."""
        return None

    def select_modules(self, description: ModelDescription) -> list[str]:
        """Modules to convert: all linears that the configuration's selection takes."""
        selection = self.config.selection
        skip = description.default_skip if selection.skip is None else ()
        chosen = (name for name in description.linears if selection.selects(name))
        return [name for name in chosen if name not in skip]

    def update_device_map(self, device_map: dict[str, str] | None) -> dict[str, str] | None:
        """The device map that the method can work with."""
        return device_map

    def offloaded(self, converted: Iterable[str], device_map: Mapping[str, str]) -> set[str]:
        """Of the modules to convert, those that the device map's places leave unquantized."""
        return set()

    def update_tp_plan(self, tp_plan: dict[str, str]) -> dict[str, str]:
        """The tensor-parallel plan that the method can work with, before cuts are chosen."""
        return tp_plan

    def update_ep_plan(self, ep_plan: dict[str, str]) -> dict[str, str]:
        """The expert-parallel plan that the method can work with."""
        return ep_plan

    def adjust_max_memory(self, max_memory: int) -> int:
        """Bytes that finished weights may take of `max_memory`."""
        return max_memory

    def check_weight(self, name: str, shape: tuple[int, ...]) -> list[Problem]:
        """Why the parameter of this name and shape cannot be quantized."""
        return []

    def check_stored(self, name: str, shape: tuple[int, ...], stored: dict[str, tuple[int, ...]]) -> list[Problem]:
        """What is wrong with the components (name -> stored shape) of a pre-quantized weight."""
        return []

    def notes(self, converted: Iterable[str]) -> Iterable[str]:
        """What to know of the conversion of these modules though nothing is wrong."""
        return ()

    def check_dtypes(self, name: str, dtypes: dict[str, str]) -> list[Problem]:
        """What is wrong with the dtypes of these components (name -> safetensors' spelling)."""
        return []

    @abstractmethod
    def layout(self, name: str, shape: tuple[int, ...], dtype: str) -> Layout:
        """How a weight of this shape is stored; `name` is the parameter's, for methods that tell modules apart."""

    def shard_nbytes(self, shard: Shard) -> int:
        """Bytes that a finished shard takes; by default what the layout says of a weight of its size."""
        return self.layout(shard.name, shard.local_shape, shard.dtype).nbytes(shard.local_shape)

    def encoded_components(self, name: str, shape: tuple[int, int], dtype: str) -> tuple[Component, ...]:
        """The components that `encode` fills, row by row; by default all of the layout that are not `gathered`."""
        return tuple(c for c in self.layout(name, shape, dtype).components if not c.replicated)

    def replicated_components(self, shard: Shard) -> frozenset[str]:
        """Of those, the ones that every rank needs for the whole weight; the same answer for every rank's shard."""
        return frozenset()

    @classmethod
    def quantizes(cls) -> bool:
        """Whether it quantizes an unquantized checkpoint on the way."""
        return True

    @classmethod
    def reads_stored(cls) -> bool:
        """Whether it loads checkpoints that are stored quantized with it."""
        return cls.load_prequantized is not Scheme.load_prequantized

    def whole_weight_workspace(self, name: str, shape: tuple[int, int]) -> int:
        """Bytes that `encode` takes beside rows and components where it must get all rows at once; 0: it need not.

        One rank of each node then reads and quantizes the whole weight.
        """
        return 0

    def plain_row_block(self, name: str) -> int:
        """Rows that `decode` needs together, of a parameter that is kept plain and stored otherwise; 0: as it is."""
        return 0

    # -- executing (every rank) ------------------------------------------------------------------------------------

    @abstractmethod
    def module(self, linear: nn.Module, shard: Shard) -> nn.Module:
        """An empty module of the shard's size that takes `linear`'s place; its parameters lie on `meta`.

        It takes over `linear.bias`, which the loader fills, and reads `self.bias` in `forward` and nowhere else: a
        row-parallel module's bias is hidden during `forward` and added once, after the sum over ranks.
        """

    @abstractmethod
    def encode(self, name: str, rows: Tensor, out: dict[str, Tensor], ops: Any) -> None:
        """Quantizes consecutive rows of a weight.

        Args:
            name: the parameter's.
            rows: `[n, columns]` in the load dtype: all columns, or a run of them that starts and ends with every
                component's elements. `n` is a multiple of what the components need, but for the weight's last rows.
            out: component -> memory to fill, flat, in row order.
            ops: kernels, a module like `distquant.kernels.reference`.
        """

    def decode(self, name: str, rows: Tensor, out: dict[str, Tensor], ops: Any) -> None:
        """Makes plain values (`out[""]`, flat) of whole rows as they are stored, where `plain_row_block` says so."""
        raise NotImplementedError(f"{self.name} stores no unquantized parameter in another form")

    @abstractmethod
    def load_encoded(self, shard: Shard, module: nn.Module, parts: dict[str, Tensor], ops: Any) -> None:
        """Fills `module` when all rows have come.

        Args:
            shard: this rank's part.
            module: as `module` made it.
            parts: component -> what the shard keeps of it, flat, rows in local order; of `replicated_components` all
                of the whole weight. On the device; the memory is the module's to keep.
            ops: kernels, as `encode` gets them.
        """

    def load_prequantized(
        self, shard: Shard, module: nn.Module, parts: dict[str, Tensor], whole: frozenset[str]
    ) -> None:
        """Fills `module` from a pre-quantized weight.

        Args:
            shard: this rank's part.
            module: as `module` made it.
            parts: stored component -> what the shard keeps of it, flat, in the stored dtype, on the device.
            whole: components that were not cut, because the layout does not know them or the cut does not fall between
                their elements: `parts` has all of them.
        """
        raise NotImplementedError(f"{self.name} has no pre-quantized checkpoints")

    def held_nbytes(self, module: nn.Module) -> int:
        """Bytes that a module holds of its weight."""
        return sum(p.nbytes for n, p in state_of(module) if n not in self.constants and n != "bias")

    def components(self, module: Any) -> dict[str, Tensor]:
        """What a filled module stores, for `dequantize` and `fingerprint_streams`."""
        raise NotImplementedError(f"{self.name} does not say what its modules store")

    def dequantized(self, module: nn.Module, shard: Shard, ops: Any) -> Tensor:
        """The weight of a filled module, `[local out, local in]` in the dtype that it was quantized from."""
        return self.dequantize(shard, self.components(module), torch_dtype(shard.dtype), ops)

    def finish_model(self, model: nn.Module) -> None:  # noqa: B027  (most methods need no mark)
        """Sets the marks by which the ecosystem knows a model quantized by this method."""

    def unsaved(self, model: nn.Module) -> str | None:
        """Reason why `from_pretrained` would not load what `save_pretrained` writes of a model; None where it does."""
        return None

    def tally(self, module: nn.Module, shard: Shard, tally: Tally) -> None:
        """Adds the module's codes and scales, as its kernel uses them, to the fingerprint."""
        for stream, values, span in self.fingerprint_streams(shard, self.components(module)):
            tally.shard(stream, values, shard.shape, shard.shard_dim, shard.owned, span=span)

    # -- stored components, without a module (every rank) ----------------------------------------------------------

    def pack(self, shard: Shard, parts: dict[str, Tensor], ops: Any) -> dict[str, Tensor]:
        """The stored local components, from what flowed; arguments as of `load_encoded`."""
        raise NotImplementedError(f"{self.name} has no components without a module")

    def pack_prequantized(self, shard: Shard, parts: dict[str, Tensor], whole: frozenset[str]) -> dict[str, Tensor]:
        """The stored local components, from those of a pre-quantized weight; as `load_prequantized`."""
        raise NotImplementedError(f"{self.name} has no components without a module")

    def dequantize(self, shard: Shard, components: Mapping[str, Tensor], dtype: torch.dtype, ops: Any) -> Tensor:
        """The weight, `dtype` `shard.local_shape`, from its stored components."""
        raise NotImplementedError(f"{self.name} has no components without a module")

    def fingerprint_streams(self, shard: Shard, components: Mapping[str, Tensor]) -> Iterable[Stream]:
        """What the fingerprint counts: unpacked codes, and scales and zeros as the kernel uses them."""
        raise NotImplementedError(f"{self.name} has no components without a module")
