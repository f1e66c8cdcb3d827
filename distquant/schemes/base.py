"""What a quantization method contributes: configuration, layout, hooks for the planner, execution and module.

The planner calls the hooks on the coordinator, where there is no device and no weight. The loader calls `quantizer` or
`restore` on every rank, with that rank's shard. A method that needs slicing code of its own lacks a word in `layout`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from packaging.version import Version

from distquant.config import QuantizationConfig
from distquant.errors import Problem
from distquant.facts import Facts
from distquant.layout import Layout
from distquant.mesh import Mesh
from distquant.schemes.shard import Shard
from distquant.skeleton.words import Skeleton

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distquant.comm import Axis
    from distquant.tally import Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What `Scheme.validate` may look at."""

    facts: Facts
    mesh: Mesh
    skeleton: Skeleton
    device_map: Mapping[str, str] | None
    prequantized: bool


class Quantizer(Protocol):
    """Takes the rows of a shard as they are read, and fills the module at the end."""

    def update(self, rows: Tensor, start: int) -> None:
        """Takes local rows `[start, start + len(rows))` in the dtype to quantize from, `[n, local columns]`.

        All pieces but the last have a multiple of `Scheme.row_step` rows; how many depends on the staging budget.

        Ranks of a cut along `in` get the same rows in the same order, so a method may call collectives here.
        """

    def finish(self) -> None:
        """Completes statistics over the whole tensor and fills the module."""


class Stored(Protocol):
    """The components of one pre-quantized weight in the checkpoint."""

    def shape(self, component: str) -> tuple[int, ...]:
        """Stored shape, from the header; KeyError where the checkpoint lacks the component."""

    def read(self, component: str, span: tuple[int, int] | None = None) -> Tensor:
        """A component on the CPU, or the elements `[start, stop)` of its first dim."""

    def rows(
        self, component: str, row_bytes: int, segments: Iterable[tuple[int, int]], columns: tuple[int, int]
    ) -> Tensor:
        """uint8, flat: a component seen as rows of `row_bytes`; of each row in `segments` the bytes `columns`."""


class Scheme(ABC):
    """Base of every quantization method."""

    name: ClassVar[str]
    """Registry name; also `TensorPlan.scheme`."""
    config_class: ClassVar[type[QuantizationConfig]]
    requires: ClassVar[Mapping[str, str]] = {}
    """Package -> minimum version."""
    min_capability: ClassVar[tuple[int, int] | None] = None
    """Least CUDA compute capability; None = any."""
    suffixes: ClassVar[Mapping[str, str]] = {}
    """How checkpoints name the components beside `<module>.weight`: suffix after `<module>.` -> component."""

    def __init__(self, config: QuantizationConfig):
        self.config = config

    # -- deciding (coordinator) ------------------------------------------------------------------------------------

    def validate(self, context: Context) -> list[Problem]:
        """Everything that keeps the method from working there; packages and capability are checked here."""
        found = []
        for package, minimum in self.requires.items():
            have = context.facts.packages.get(package)
            if have is None or Version(have) < Version(minimum):
                what = f"{package} {have}" if have else f"{package} is not installed"
                what += f", {self.name} needs {minimum} or newer"
                found.append(Problem("environment", what, f"Run: pip install '{package}>={minimum}'"))
        capability = context.facts.capability
        if self.min_capability and capability and capability < self.min_capability:
            have, need = (".".join(map(str, c)) for c in (capability, self.min_capability))
            found.append(
                Problem("environment", f"compute capability {have}, {self.name} needs {need}", "Use a newer GPU")
            )
        return found

    def converts(self, skeleton: Skeleton) -> list[str]:
        """Modules to convert: all linears that the configuration's selection takes."""
        selection = self.config.selection
        skip = skeleton.default_skip if selection.skip is None else ()
        chosen = (name for name in skeleton.linears if selection.selects(name))
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
        """Why a weight of this shape cannot be quantized."""
        return []

    def check_stored(self, name: str, shape: tuple[int, ...], stored: dict[str, tuple[int, ...]]) -> list[Problem]:
        """What is wrong with the components (name -> stored shape) of a pre-quantized weight."""
        return []

    @abstractmethod
    def layout(self, shape: tuple[int, ...], dtype: str) -> Layout:
        """How a weight of this shape is stored."""

    def shard_nbytes(self, shard: Shard) -> int:
        """Bytes that a finished shard takes; by default what the layout says of a weight of its size."""
        return self.layout(shard.local_shape, shard.dtype).nbytes(shard.local_shape)

    def row_step(self, shard: Shard) -> int:
        """Rows that can only be quantized together: every piece but the last has a multiple of this many."""
        return 1

    # -- executing (every rank) ------------------------------------------------------------------------------------

    @abstractmethod
    def module(self, linear: nn.Module, shard: Shard) -> nn.Module:
        """An empty module of the shard's size that takes `linear`'s place; its parameters lie on `meta`.

        It takes over `linear.bias`, which the loader fills, and reads `self.bias` in `forward` and nowhere else: a
        row-parallel module's bias is hidden during `forward` and added once, after the sum over ranks.
        """

    @abstractmethod
    def quantizer(self, shard: Shard, module: nn.Module, axis: Axis, device: Any) -> Quantizer:
        """Quantizes this rank's rows as they come, into `module`."""

    def restore(self, shard: Shard, module: nn.Module, stored: Stored, device: Any) -> None:
        """Fills `module` from a pre-quantized weight."""
        raise NotImplementedError(f"{self.name} has no pre-quantized checkpoints")

    def finish_model(self, model: nn.Module) -> None:  # noqa: B027  (most methods need no mark)
        """Sets the marks by which the ecosystem knows a model quantized by this method."""

    @abstractmethod
    def tally(self, module: nn.Module, shard: Shard, tally: Tally) -> None:
        """Adds the module's codes and scales, as its kernel uses them, to the fingerprint."""
