"""The frozen result of planning: one entry for each tensor. Every rank derives its own tasks from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any

from distquant.environment import Environment
from distquant.errors import InputError
from distquant.model.description import Source
from distquant.planning.generation_memory import DeviceMemory, Estimates
from distquant.planning.read_strategy import OWN
from distquant.planning.summary import plan_html_fragment, plan_repr, plan_text
from distquant.sharding.heads import HeadPartition
from distquant.sharding.mesh import Mesh
from distquant.sharding.partition import Partition

PLAN_FORMAT = 5
"""Version of the JSON; a plan of another version is invalid."""


def _renamed(old: str, new: str) -> Any:
    """Returns a property that warns and gives the field that is called `new` now."""

    def get(self: Any) -> Any:
        message = f"{type(self).__name__}.{old} is called {new} now; the old name goes with the next release"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return getattr(self, new)

    return property(get, doc=f"Deprecated name of `{new}`.")


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One parameter or buffer: where its values come from, and how it is sharded.

    Attributes:
        name: path in the model.
        shape: logical shape on all ranks together, `[out, in]` for a linear weight.
        dtype: torch's name of the dtype it is loaded in (and quantized from).
        scheme: name of the scheme that stores it; "none" if it is not quantized.
        sources: checkpoint tensors that fill it.
        shard_dim: dim that is sharded over tp; None = every rank holds all of it.
        partition: key into `LoadPlan.partitions`.
        transposed: True if the checkpoint stores it `[in, out]` (GPT-2's Conv1D), so that it is transposed on the way.
        reading: how the ranks of a node read it, a key of `planning.read_strategy.REASONS`.
        experts: for a stack of experts, key into `LoadPlan.partitions` of how they are distributed over ep. The first
            dim of `shape` then counts them, `name` has a star for their number, and `shard_dim` is never 0.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scheme: str
    sources: tuple[Source, ...]
    shard_dim: int | None = None
    partition: str | None = None
    transposed: bool = False
    reading: str = OWN
    experts: str | None = None

    dim = _renamed("dim", "shard_dim")
    cut = _renamed("cut", "partition")


@dataclass(frozen=True, slots=True)
class ModuleShard:
    """The parallel style of a sharded module, and the partition of its sharded dim."""

    style: str
    partition: str

    cut = _renamed("cut", "partition")


@dataclass(frozen=True, slots=True)
class AttentionShard:
    """The heads of a sharded attention module: key into `LoadPlan.heads`, and its head size."""

    heads: str
    head_dim: int


@dataclass(frozen=True, slots=True)
class ExpertsShard:
    """A module of fused experts that are loaded one by one.

    Attributes:
        ep_partition: key into `LoadPlan.partitions`, of the experts over ep.
        partition: key of the intermediate features over tp; None = every rank of tp holds all features of its experts.
    """

    ep_partition: str
    partition: str | None

    dealt = _renamed("dealt", "ep_partition")
    cut = _renamed("cut", "partition")


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of the model's parallel plan: the style it asked for, the one it became, and the reason."""

    pattern: str
    asked: str
    became: str
    reason: str
    modules: int


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of one rank: read, kept quantized, kept unquantized, and staged on the way."""

    rank: int
    parameters: int
    read: int
    quantized: int
    unquantized: int
    staging: int

    @property
    def finished(self) -> int:
        return self.quantized + self.unquantized

    @property
    def peak(self) -> int:
        return self.finished + self.staging


@dataclass(frozen=True, kw_only=True, repr=False)
class LoadPlan:
    """All decisions that are made before a weight moves. `digest` identifies it; `to_json` and `from_json` carry it."""

    model: str
    model_type: str
    architecture: str
    mesh: Mesh
    dtype: str
    quantization_config: dict[str, Any]
    """The merged configuration in Hugging Face's spelling."""
    selection: dict[str, Any]
    """distquant's own options that select the modules to convert."""
    prequantized: bool
    dequantize: bool
    """True if weights that are stored quantized are loaded in `dtype`, as ordinary linears."""
    tensors: tuple[TensorPlan, ...]
    tied: dict[str, str]
    partitions: dict[str, Partition]
    heads: dict[str, HeadPartition]
    modules: dict[str, ModuleShard]
    attentions: dict[str, AttentionShard]
    experts: dict[str, ExpertsShard]
    """Modules of experts that are held as stacks of single ones; others stay the model's own."""
    dispatch: str
    """How tokens reach experts on other ranks of ep, a key of `options.DISPATCH`."""
    converted: tuple[str, ...]
    """Modules that the scheme replaces."""
    rules: tuple[Rule, ...]
    notes: tuple[str, ...]
    """Sentences for the user: what is replicated, repeated, left unquantized or dropped, and its cost."""
    memory: tuple[RankMemory, ...]
    staging: int
    nodes: tuple[int, ...]
    """Node of each rank. Ranks of one node share memory, and together read each byte once."""
    device_map: dict[str, str] | None
    shards: dict[str, tuple[str, int]]
    """File -> (sha256 of its header, size). A rank whose files differ does not load."""
    check_at_load: tuple[str, ...]
    environment: Environment = field(default_factory=Environment)
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    """Attention that was asked for; None = transformers' choice, and then the JSON does not name it."""
    estimates: Estimates | None = field(default=None, compare=False)
    """Facts that `memory_for` and the printed text need; neither in the JSON nor in the digest."""

    cuts = _renamed("cuts", "partitions")

    @cached_property
    def digest(self) -> str:
        """sha256 of the canonical JSON without `environment`, 64 hex digits."""
        return hashlib.sha256(self._json(without="environment").encode()).hexdigest()

    @property
    def checkpoint_bytes(self) -> int:
        return sum(size for _, size in self.shards.values())

    def memory_for(self, context: int | None = None, batch: int | None = None) -> tuple[DeviceMemory, ...]:
        """Returns the memory of each device, for a context and batch: weights, load buffer, cache and activations.

        Args:
            context: tokens of each sequence, prompt and answer together. Default: those that the plan was made with.
            batch: sequences that each replica generates at once. Default: as the plan was made with.

        Raises:
            InputError: fewer than one token or sequence; or the plan was read from JSON, which has no estimates.
        """
        if self.estimates is None:
            fault = "was read from JSON, which holds no estimates of memory"
            raise InputError.one("plan", fault, "Plan again from the checkpoint")
        return self.estimates.memory(context, batch)

    def fits(self, context: int | None = None, batch: int | None = None) -> bool | None:
        """Returns True if every device has the memory to load and to generate; None where no limit is known.

        Arguments and errors are those of `memory_for`.
        """
        found = [device.fits for device in self.memory_for(context, batch)]
        return False if False in found else None if None in found else True

    def __str__(self) -> str:
        return plan_text(self)

    def __repr__(self) -> str:
        return plan_repr(self)

    def _repr_html_(self) -> str:
        """Returns HTML for notebooks."""
        return plan_html_fragment(self)

    def to_json(self) -> str:
        """Returns canonical JSON (sorted keys, no spaces)."""
        return self._json()

    def _json(self, without: str | None = None) -> str:
        fields = {"format": PLAN_FORMAT, **_plain(self)}
        fields.pop(without, None)
        if self.attn_implementation is None:
            del fields["attn_implementation"]
        del fields["estimates"]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), default=_plain)

    @classmethod
    def from_json(cls, text: str) -> LoadPlan:
        """Reads the JSON of `to_json`; raises `InputError` for another format."""
        try:
            fields = json.loads(text)
            version = fields.pop("format")
            if version != PLAN_FORMAT:
                raise InputError.one("plan", f"format {version}, this is {PLAN_FORMAT}", "Plan again with this version")
            return cls(**_restore(fields))
        except InputError:
            raise
        except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
            fault = f"not a plan in JSON ({type(error).__name__}: {error})"
            raise InputError.one("plan", fault, "Write one with `distquant plan --json`") from error


_ROWS = {kind: attrgetter(*(f.name for f in dataclasses.fields(kind))) for kind in (TensorPlan, Source)}
"""Types that are written as lists, because there are many of them."""


def _plain(value: Any) -> Any:
    """Converts one level for JSON: dataclasses to dicts, tensors and sources to short lists."""
    if (row := _ROWS.get(type(value))) is not None:
        return row(value)
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _partition(fields: dict[str, Any]) -> Partition:
    return Partition(fields["size"], _tuples(fields["parts"]))


def _source(tensor: str, component: str, offset: Any, take: Any) -> Source:
    return Source(tensor, component, offset if offset is None else tuple(offset), take if take is None else tuple(take))


def _tensor(row: list[Any]) -> TensorPlan:
    name, shape, dtype, scheme, sources, *rest = row
    return TensorPlan(name, tuple(shape), dtype, scheme, tuple(_source(*source) for source in sources), *rest)


def _restore(fields: dict[str, Any]) -> dict[str, Any]:
    environment = dict(fields["environment"])
    for name in ("capability", "nodes", "differing"):
        environment[name] = _tuples(environment.get(name, []))
    heads = fields["heads"].items()
    return {
        **fields,
        "mesh": Mesh(**fields["mesh"]),
        "tensors": tuple(map(_tensor, fields["tensors"])),
        "partitions": {key: _partition(partition) for key, partition in fields["partitions"].items()},
        "heads": {
            key: HeadPartition(_partition(h["query"]), _partition(h["kv"]), tuple(h["groups"])) for key, h in heads
        },
        "modules": {key: ModuleShard(**value) for key, value in fields["modules"].items()},
        "attentions": {key: AttentionShard(**value) for key, value in fields["attentions"].items()},
        "experts": {key: ExpertsShard(**value) for key, value in fields["experts"].items()},
        "converted": tuple(fields["converted"]),
        "rules": tuple(Rule(**rule) for rule in fields["rules"]),
        "notes": tuple(fields["notes"]),
        "memory": tuple(RankMemory(**row) for row in fields["memory"]),
        "shards": {key: (digest, size) for key, (digest, size) in fields["shards"].items()},
        "check_at_load": tuple(fields["check_at_load"]),
        "nodes": tuple(fields["nodes"]),
        "environment": Environment(**environment),
    }
