"""A quantization method in three interfaces, of which this is the first: the layout rules, which the planner asks.

1. `Scheme` (here): how a weight is stored, which modules are converted, what is not supported. Needs no torch.
2. `Codec` (`codec.py`): converts rows to stored components and these to a weight. Knows no module.
3. `ModuleFactory` (`module_factory.py`): makes the local module, fills it and reads it back.

A method that converts no module (`none`, and those that transformers loads itself) has the first alone. The others
derive from `QuantizedScheme`, which joins the three; methods that quantize unquantized checkpoints are an `Encoder`,
too.

The planner calls the layout rules on the coordinator, where there is no device and no weight. A method that needs
slicing code of its own lacks a word in `distquant.sharding.layout`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from packaging.version import Version

from distquant.checkpoint import TensorInfo
from distquant.config import QuantizationConfig
from distquant.config.selection import matches
from distquant.environment import Environment
from distquant.errors import Problem
from distquant.model.description import Linear, ModelDescription
from distquant.model.module_names import ModuleNames
from distquant.old_names import OldFields
from distquant.sharding.layout import Component, Layout
from distquant.sharding.mesh import Mesh
from distquant.sharding.shard import Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Context(OldFields):
    """Facts that `Scheme.validate` may look at."""

    old_fields: ClassVar[Mapping[str, str]] = {"facts": "environment", "skeleton": "description"}
    environment: Environment
    mesh: Mesh
    description: ModelDescription
    device_map: Mapping[str, str] | None
    prequantized: bool


class Scheme(ABC):
    """Layout rules of a quantization method."""

    name: ClassVar[str]
    """Registry name; also `TensorPlan.scheme`."""
    config_class: ClassVar[type[QuantizationConfig]]
    requires: ClassVar[Mapping[str, str]] = {}
    """Package -> minimum version; "0" = any."""
    min_capability: ClassVar[tuple[int, int] | None] = None
    """Least CUDA compute capability; None = any."""
    delegated: ClassVar[bool] = False
    """True if transformers loads the model with its own quantizer."""
    suffixes: ClassVar[Mapping[str, str]] = {}
    """Names of components that checkpoints store beside `<module>.weight`: suffix after `<module>.` -> component."""
    fused_suffixes: ClassVar[Mapping[str, str]] = {}
    """The same beside a parameter of fused experts: the text glued to its name, such as `_scales`."""
    unsliced: ClassVar[frozenset[str]] = frozenset()
    """Components of stored weights of which no slice belongs to a slice of the weight: replicated on every rank."""
    of_activations: ClassVar[frozenset[str]] = frozenset()
    """Components that are about activations: a weight that has no others is not a quantized one."""
    form_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that name the form of stored weights: where one is not supported, there is no more to say of tensors."""
    by_bitsandbytes: ClassVar[bool] = False
    """True if the library bitsandbytes has kernels for it."""
    stacks: ClassVar[bool] = False
    """True if experts can be kept in it: equal shards have components of equal names, shapes and dtypes."""
    unmoved: ClassVar[Mapping[str, str]] = dict.fromkeys(("cpu", "disk"), "hooks are not known to move its modules")
    """Places from which its modules cannot be moved for each forward, `cpu` (beside other devices) or `disk` -> why."""

    names: ModuleNames = ModuleNames()
    """Names of the model's modules; empty until the model is known."""

    def __init__(self, config: QuantizationConfig):
        self.config = config

    # -- abilities -------------------------------------------------------------------------------------------------

    @classmethod
    def quantizes(cls) -> bool:
        """True if it loads unquantized checkpoints."""
        return True

    @classmethod
    def reads_stored(cls) -> bool:
        """True if it loads checkpoints that are stored quantized with it."""
        return bool(cls.suffixes)

    # -- the request -----------------------------------------------------------------------------------------------

    def validate(self, context: Context) -> list[Problem]:
        """Lists everything that keeps the method from working there; packages and capability are checked here."""
        problems = []
        for package, minimum in self.requires.items():
            version = context.environment.packages.get(package)
            if version is None or Version(version) < Version(minimum):
                any_version = Version(minimum) == Version("0")
                fault = f"{package} {version}" if version else f"{package} is not installed"
                fault += f", {self.name} needs it" if any_version else f", {self.name} needs {minimum} or newer"
                wanted = package if any_version else f"{package}>={minimum}"
                problems.append(Problem("environment", fault, f"Run: pip install '{wanted}'"))
        capability = context.environment.capability
        if self.min_capability and capability and capability < self.min_capability:
            have, need = (".".join(map(str, c)) for c in (capability, self.min_capability))
            fault = f"compute capability {have}, {self.name} needs {need}"
            problems.append(Problem("environment", fault, "Use a newer GPU"))
        return problems

    def select_modules(self, description: ModelDescription) -> list[str]:
        """Modules to convert: all linears that the configuration's selection takes."""
        skip = description.default_skip if self.config.selection.skip is None else ()
        chosen = (name for name in description.linears if self.selects(name))
        return [name for name in chosen if name not in skip]

    def selects(self, name: str) -> bool:
        """True if the configuration's own lists take the module."""
        return self.config.selection.selects(name, self.matching)

    def matching(self, pattern: str, name: str) -> bool:
        """True if a pattern of such a list means the module, by one of its names."""
        return self.names.matching(pattern, name, matches)

    def config_as_stored(self, tensors: Mapping[str, TensorInfo]) -> QuantizationConfig:
        """Returns the configuration with what the checkpoint's headers say of it, where they say more."""
        return self.config

    def unsupported_form(self, problems: Iterable[Problem]) -> bool:
        """True if one of these problems is that the form of stored weights is not supported."""
        fields = (problem.where.partition(" ")[0].rpartition(".")[2] for problem in problems)
        return not self.form_fields.isdisjoint(fields)

    def can_be_stored(self, linear: Linear) -> bool:
        """True if the configuration says how the weight of a module would be stored that is found quantized."""
        return True

    def update_device_map(self, device_map: dict[str, str] | None) -> dict[str, str] | None:
        """Returns the device map that the method can work with."""
        return device_map

    def offloaded(self, converted: Iterable[str], device_map: Mapping[str, str]) -> set[str]:
        """Of the modules to convert, those that the device map's places leave unquantized."""
        return set()

    def update_tp_plan(self, tp_plan: dict[str, str]) -> dict[str, str]:
        """Returns the tensor-parallel plan that the method can work with, before partitions are chosen."""
        return tp_plan

    def update_ep_plan(self, ep_plan: dict[str, str]) -> dict[str, str]:
        """Returns the expert-parallel plan that the method can work with."""
        return ep_plan

    def adjust_max_memory(self, max_memory: int) -> int:
        """Bytes that finished weights may take of `max_memory`."""
        return max_memory

    def notes(self, converted: Iterable[str]) -> Iterable[str]:
        """Remarks on the conversion of these modules, of which none is an error."""
        return ()

    # -- checks of one weight --------------------------------------------------------------------------------------

    def group_size(self, name: str, shape: tuple[int, ...]) -> int | None:
        """Inputs of the parameter of this name that share a scale, if all inputs must be a multiple of that."""
        return None

    def check_weight(self, name: str, shape: tuple[int, ...]) -> list[Problem]:
        """Reasons why the parameter of this name and shape cannot be quantized."""
        return []

    def check_stored(self, name: str, shape: tuple[int, ...], stored: dict[str, tuple[int, ...]]) -> list[Problem]:
        """Faults of the components (name -> stored shape) of a pre-quantized weight."""
        return []

    def check_dtypes(self, name: str, dtypes: dict[str, str]) -> list[Problem]:
        """Faults of the dtypes of these components (name -> safetensors' spelling)."""
        return []

    # -- the layout ------------------------------------------------------------------------------------------------

    @abstractmethod
    def layout(self, name: str, shape: tuple[int, ...], dtype: str) -> Layout:
        """Declares how a weight of this shape is stored; `name` is the parameter's, as modules may differ."""

    def shard_nbytes(self, shard: Shard) -> int:
        """Bytes of a finished shard; by default those that the layout gives a weight of its size."""
        return self.layout(shard.name, shard.local_shape, shard.dtype).nbytes(shard.local_shape)

    def encoded_components(self, name: str, shape: tuple[int, int], dtype: str) -> tuple[Component, ...]:
        """Components that `encode` fills, row by row; by default those of the layout that are not `replicated`."""
        return tuple(c for c in self.layout(name, shape, dtype).components if not c.replicated)

    def replicated_components(self, shard: Shard) -> frozenset[str]:
        """Of these, the ones that every rank needs for the whole weight; the same answer for every rank's shard."""
        return frozenset()

    def whole_weight_workspace(self, name: str, shape: tuple[int, int]) -> int:
        """Bytes that `encode` takes beside rows and components where it needs all rows at once; 0: it does not.

        One rank of each node then reads and quantizes the whole weight.
        """
        return 0

    def plain_row_block(self, name: str) -> int:
        """Rows that a `PlainDecoder` needs together, of a parameter that stays unquantized; 0: it is stored so."""
        return 0
