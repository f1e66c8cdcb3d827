"""Decides everything, once: resolves the configuration, checks it all, cuts the model, and freezes a `LoadPlan`.

Reads configs and headers only. Touches no weight, no device and no process group. Every problem that can be known from
them is raised together, before a weight byte moves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from distquant.checkpoint import Checkpoint, open_checkpoint
from distquant.config import GgufConfig, Merged, NoneConfig, QuantizationConfig, detect
from distquant.config.resolve import resolve
from distquant.environment import Environment, parse_bytes
from distquant.errors import InputError, Problems
from distquant.garbage_collection import without_collector
from distquant.model import (
    STAR,
    GgufNames,
    Linear,
    ModelDescription,
    as_stored,
    build,
    describe_model,
    gguf_names,
    split_experts,
    tell_parts,
    with_gguf_sources,
)
from distquant.planning.device_map import check_memory, infer_device_map, read_memory
from distquant.planning.expert_parallel import expert_rules, plan_experts
from distquant.planning.load_plan import LoadPlan, ModuleShard, RankMemory, TensorPlan
from distquant.planning.notes import notes_on
from distquant.planning.plan_builder import Draft
from distquant.planning.prepared import Prepared
from distquant.planning.read_assignment import nodes_of
from distquant.planning.read_strategy import read_strategy
from distquant.planning.request import Request, collected, read_request
from distquant.planning.tensor_parallel import (
    COLWISE,
    COLWISE_GATHER,
    GRAD_REDUCE,
    ROWWISE,
    ROWWISE_SPLIT,
    VOCAB_EMBEDDING,
    ParallelPlan,
    rewrite_tp_plan,
)
from distquant.planning.validation import check_draft, check_rank_memory
from distquant.process_state import changing_process_state
from distquant.quantization import Scheme, Shard, config_classes, scheme_for
from distquant.sharding.layout import Layout, plain
from distquant.sharding.mesh import Mesh

SHARD_DIM = {COLWISE: 0, COLWISE_GATHER: 0, VOCAB_EMBEDDING: 0, ROWWISE: 1, ROWWISE_SPLIT: 1}
"""The weight's dim that each style cuts."""


def make_plan(request: Request, environment: Environment) -> LoadPlan:
    """Plans a load; raises `InputError` with every problem found."""
    return plan_and_open(request, environment)[0]


@without_collector()
@changing_process_state()
def plan_and_open(request: Request, environment: Environment) -> tuple[LoadPlan, Prepared]:
    """As `make_plan`; also gives what was planned, for whoever loads it next."""
    problems = Problems()
    given = read_request(request, problems)
    mesh = given.mesh
    checkpoint = None
    with collected(problems):
        checkpoint = open_checkpoint(request.model, revision=request.revision)
    if checkpoint is None:
        problems.raise_if_any()
        raise AssertionError("open_checkpoint neither returned nor raised")
    merged, skipped = None, None
    with collected(problems):
        merged, skipped = resolve(checkpoint.config, given.config, config_classes(), request.on_unsupported)
    if merged is None:
        problems.raise_if_any()
        raise AssertionError("resolve neither returned nor raised")
    try:
        model = build(checkpoint.path, given.dtype, trust_remote_code=request.trust_remote_code)
    except InputError as error:
        raise InputError([*problems, *error.problems]) from error
    described = _describe(request, checkpoint, model, merged, skipped, mesh, problems)
    understood = not problems
    scheme = described.scheme
    draft = Draft(
        checkpoint=checkpoint,
        scheme=scheme,
        mesh=mesh,
        staging=given.staging,
        nodes=environment.nodes if len(environment.nodes) == mesh.size else nodes_of(mesh.size, request.ranks_per_node),
        prequantized=described.merged.prequantized,
        dequantize=described.merged.dequantize and not scheme.delegated,
        description=described.split(described.stacked),
        stacked=described.stacked,
        skipped=described.skipped,
        dispatch=given.dispatch,
    )
    draft.converted = _converted(draft, problems)
    if mesh.ep * mesh.tp == 1:  # experts of which nothing is converted stay the model's own
        needed = {name.partition(f".{STAR}.")[0] for name in draft.converted if STAR in name}
        if needed != set(draft.stacked):
            draft.stacked = tuple(name for name in draft.stacked if name in needed)
            draft.description = described.split(draft.stacked)
    if described.names is not None:
        draft.description = with_gguf_sources(draft.description, described.names)
    if draft.skipped is not None or (scheme.delegated and draft.prequantized):
        draft.description, draft.kept = as_stored(draft.description, checkpoint.tensors)
        draft.converted = [name for name in draft.converted if name in draft.description.linears]
    return _Planner(request, environment, draft, problems, understood).plan(model), Prepared(checkpoint, model)


@dataclass(frozen=True)
class _Described:
    """A checkpoint, in the words of its method, or as it is stored where that is left out."""

    scheme: Scheme
    merged: Merged
    skipped: dict[str, Any] | None
    whole: ModelDescription
    """With experts as the model's own parameters."""
    stacked: tuple[str, ...]
    """Modules of experts that may be split into stacks."""
    shapes: dict[str, tuple[int, ...]]
    names: GgufNames | None

    def split(self, modules: tuple[str, ...]) -> ModelDescription:
        return split_experts(self.whole, modules, self.shapes)


def _describe(
    request: Request,
    checkpoint: Checkpoint,
    model: Any,
    merged: Merged,
    skipped: dict[str, Any] | None,
    mesh: Mesh,
    problems: Problems,
) -> _Described:
    """Describes model and checkpoint; without the method if that is asked for and it cannot place its tensors."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    names, config = None, merged.config
    if isinstance(config, GgufConfig) and checkpoint.types:
        names = gguf_names(model, checkpoint.tensors, checkpoint.architecture)
        types = {param: checkpoint.types[name] for name, param in names.params.items()}
        config = replace(config, types=types, interleaved=names.interleaved)
        shapes = {names.params.get(name, name): shape for name, shape in shapes.items()}
    scheme = scheme_for(config)
    unplaced = Problems()
    glued = {STAR + suffix: component for suffix, component in scheme.fused_suffixes.items()}
    suffixes = {**scheme.suffixes, **glued} if merged.prequantized else {}
    description = describe_model(model, shapes, suffixes, unplaced)
    divided = mesh.ep * mesh.tp > 1
    stacked = tuple(description.experts) if scheme.stacks or divided else ()
    found = _Described(scheme, merged, skipped, description, stacked, shapes, names)
    whole = {name: parts for name, parts in description.parts.items() if name.rpartition(".")[0] not in stacked}
    tell_parts(whole, unplaced)
    if not unplaced or not merged.prequantized or request.on_unsupported != "skip":
        problems.extend(unplaced)
        return found
    description = describe_model(model, shapes, {}, problems)
    stacked = tuple(description.experts) if divided else ()
    without = Merged(NoneConfig(), False)
    return _Described(
        scheme_for(without.config), without, detect(checkpoint.config), description, stacked, shapes, names
    )


@dataclass
class _Planner:
    """Fills in a draft step by step, and freezes it."""

    request: Request
    environment: Environment
    draft: Draft
    problems: Problems
    understood: bool
    """Whether the request could be read whole; sizes that follow from a guess would mislead."""

    def plan(self, model: Any) -> LoadPlan:
        draft, config = self.draft, self.draft.scheme.config
        draft.device_map = self._device_map(model)
        if draft.device_map is not None:
            draft.offloaded = draft.scheme.offloaded(draft.converted, draft.device_map)
            draft.converted = [name for name in draft.converted if name not in draft.offloaded]
        check_draft(draft, self.environment, self.request.device_map is not None, self.problems)
        draft.parallel = self._parallel()
        draft.tensors = tuple(self._tensors())
        memory: tuple[RankMemory, ...] = ()
        with collected(self.problems):
            memory = tuple(draft.memory())
        self._check_memory(memory)
        self.problems.raise_if_any()
        return LoadPlan(
            model=str(draft.checkpoint.path),
            model_type=draft.description.model_type,
            architecture=draft.description.architecture,
            mesh=draft.mesh,
            dtype=str(model.dtype).removeprefix("torch."),
            quantization_config=draft.skipped if draft.kept.weights and draft.skipped else config.to_dict(),
            selection=_extras(config),
            prequantized=draft.prequantized or bool(draft.kept.weights),
            dequantize=draft.dequantize,
            tensors=draft.tensors,
            tied=draft.description.tied,
            partitions=draft.parallel.partitions,
            heads=draft.parallel.heads,
            modules=draft.parallel.modules,
            attentions=draft.parallel.attentions,
            experts=draft.parallel.experts,
            dispatch=draft.dispatch,
            converted=tuple(draft.converted),
            rules=tuple(draft.parallel.rules),
            notes=tuple(notes_on(draft)),
            memory=memory,
            staging=draft.staging,
            nodes=draft.nodes,
            device_map=draft.device_map,
            shards=draft.checkpoint.digests(),
            check_at_load=tuple(self._check_at_load()),
            environment=self.environment,
            trust_remote_code=self.request.trust_remote_code,
        )

    # -- devices and memory ----------------------------------------------------------------------------------------

    def _device_map(self, model: Any) -> dict[str, str] | None:
        asked, draft = self.request.device_map, self.draft
        if asked is None:
            return None
        if draft.mesh.size > 1:
            what = f"given together with mesh {draft.mesh} ({draft.mesh.size} ranks)"
            self.problems.add("device_map", what, "Use a mesh to cut the model, or a device_map in one process")
            return None

        def nbytes(name: str) -> int:
            linear, weight = draft.description.linears[name], draft.description.params[f"{name}.weight"]
            shard = Shard(f"{name}.weight", (linear.out_features, linear.in_features), weight.dtype)
            return draft.scheme.shard_nbytes(shard) * max(linear.experts, 1)

        sizes = {} if draft.dequantize else {name: nbytes(name) for name in draft.converted}
        asked = draft.scheme.update_device_map(asked) if isinstance(asked, dict) else asked
        return infer_device_map(
            model, asked, self._memory_by_device(), sizes, draft.scheme.adjust_max_memory, self.problems
        )

    def _memory_by_device(self) -> Mapping[Any, Any] | None:
        """`max_memory` with one size read as that of the first device."""
        given = self.request.max_memory
        if given is None or isinstance(given, Mapping):
            return given
        return {"cpu" if self.environment.device_type == "cpu" else 0: given}

    def _limits(self, device_map: Mapping[str, str]) -> Mapping[str, int]:
        """Bytes that each device of a map may hold, as far as they are given."""
        given = self.request.max_memory
        if given is None or isinstance(given, Mapping):
            return read_memory(given) or {}
        return dict.fromkeys(set(device_map.values()) - {"disk"}, parse_bytes(given, "max_memory"))

    def _check_memory(self, memory: tuple[RankMemory, ...]) -> None:
        if not self.understood:
            return
        if self.request.device_map is None:
            check_rank_memory(self.draft, memory, self.environment, self.problems)
        elif self.draft.device_map is not None:
            with collected(self.problems):
                sizes = ((tensor.name, self.draft.local(tensor, 0)[1]) for tensor in self.draft.tensors)
                check_memory(sizes, self.draft.device_map, self._limits(self.draft.device_map), self.problems)

    def _check_at_load(self) -> Iterator[str]:
        if self.environment.device_type is None:
            yield "device type and count" if self.environment.capability else "device type, capability and count"
        if self.environment.memory is None and self.draft.device_map is None:
            yield "memory of each rank (declare it with max_memory)"
        if not self.environment.nodes and self.draft.mesh.size > 1:
            assumed = max(Counter(self.draft.nodes).values())
            yield f"which ranks share a node ({assumed} each, as planned)"

    # -- cutting ---------------------------------------------------------------------------------------------------

    def _parallel(self) -> ParallelPlan:
        draft, description, mesh = self.draft, self.draft.description, self.draft.mesh
        scheme, converted = draft.scheme, set(draft.converted)

        def layout_of(name: str) -> Layout:
            linear, weight = description.linears[name], description.params.get(f"{name}.weight")
            dtype = weight.dtype if weight else "float32"
            shape = (linear.out_features, linear.in_features)
            first = f"{name}.weight".replace(STAR, "0")
            return scheme.layout(first, shape, dtype) if name in converted else plain(dtype)

        parallel = ParallelPlan()
        plans = scheme.update_tp_plan(dict(description.tp_plan)), scheme.update_ep_plan(dict(description.ep_plan))
        if mesh.tp > 1 and description.tp_plan:
            for_experts = {rule for rules in expert_rules(description, plans[0]).values() for rule in rules}
            dense = {rule: style for rule, style in plans[0].items() if rule not in for_experts}
            parallel = rewrite_tp_plan(description, dense, mesh.tp, layout_of)
        if draft.stacked and all(mesh.ep <= description.experts[name].count for name in draft.stacked):
            plan_experts(description, draft.stacked, mesh, plans, layout_of, parallel)
        return parallel

    def _tensors(self) -> Iterator[TensorPlan]:
        """One entry a tensor, in the order of files and offsets."""
        description, converted = self.draft.description, set(self.draft.converted)
        order = {name: i for i, name in enumerate(self.draft.checkpoint.tensors)}

        def place(name: str) -> int:
            return min((order[source.tensor] for source in description.sources[name]), default=0)

        for name in sorted(description.sources, key=place):
            owner, _, leaf = name.rpartition(".")
            scheme = self.draft.scheme.name if owner in converted and leaf == "weight" else "none"
            linear = description.linears.get(owner)
            if linear is not None and linear.experts:
                if self.draft.parallel.experts:
                    yield self._stack(linear, name, leaf, scheme)
            else:
                yield self._tensor(linear, name, leaf, scheme)

    def _tensor(self, linear: Linear | None, name: str, leaf: str, scheme: str) -> TensorPlan:
        draft, parallel = self.draft, self.draft.parallel
        param, sources = draft.description.params[name], draft.description.sources[name]
        shard = parallel.modules.get(name.rpartition(".")[0]) or self._tied_shard(name)
        dim = _shard_dim(shard, leaf)
        transposed = scheme != "none" and linear is not None and linear.transposed
        shape = param.shape[::-1] if transposed else param.shape
        partition = shard.partition if shard is not None and dim is not None else None
        transposed = transposed and not draft.prequantized
        reading = read_strategy(dim, parallel.partitions[partition] if partition else None, draft.mesh, draft.nodes)
        return TensorPlan(name, shape, param.dtype, scheme, sources, dim, partition, transposed, reading)

    def _stack(self, linear: Linear, name: str, leaf: str, scheme: str) -> TensorPlan:
        """A projection of all experts of a module, or its biases."""
        draft, parallel = self.draft, self.draft.parallel
        param, sources = draft.description.params[name], draft.description.sources[name]
        dealt = parallel.experts[name.partition(f".{STAR}.")[0]].dealt
        dim, partition = parallel.stacks.get(linear.name, (None, None))
        if leaf == "bias" and dim == 1:
            dim, partition = None, None
        transposed = linear.transposed and leaf == "weight" and not (draft.prequantized and scheme != "none")
        found = parallel.partitions[partition] if partition else None
        reading = read_strategy(dim, found, draft.mesh, draft.nodes, expert=True)
        place = None if dim is None else dim + 1
        return TensorPlan(name, param.shape, param.dtype, scheme, sources, place, partition, transposed, reading, dealt)

    def _tied_shard(self, name: str) -> ModuleShard | None:
        """The shard of a module whose parameter is tied to this one (its own module may have no rule)."""
        modules, tied = self.draft.parallel.modules, self.draft.description.tied
        sharers = (target.rpartition(".")[0] for target, source in tied.items() if source == name)
        return next((modules[module] for module in sharers if module in modules), None)


def _converted(draft: Draft, problems: Problems) -> list[str]:
    """Modules to convert; a tied weight is never converted (it is an embedding's as well)."""
    description, scheme = draft.description, draft.scheme
    if not draft.prequantized:
        problems.extend(scheme.config.selection.unmatched(_leaves((*description.modules, *_stacks_of(description)))))
    found = [name for name in scheme.select_modules(description) if f"{name}.weight" in description.params]
    return found if scheme.stacks else [name for name in found if STAR not in name]


def _stacks_of(description: ModelDescription) -> list[str]:
    return [name for name, linear in description.linears.items() if linear.experts]


def _shard_dim(shard: ModuleShard | None, leaf: str) -> int | None:
    """The dim of a module's parameter that its style cuts; None = replicated."""
    if shard is None or shard.style == GRAD_REDUCE:
        return None
    dim = SHARD_DIM[shard.style]
    if leaf == "bias":
        return 0 if dim == 0 else None
    return dim


def _leaves(modules: tuple[str, ...]) -> list[str]:
    parents = {name.rpartition(".")[0] for name in modules}
    return [name for name in modules if name not in parents]


def _extras(config: QuantizationConfig) -> dict[str, Any]:
    plain_dict = config.to_dict()
    return {key: value for key, value in config.to_dict(extras=True).items() if key not in plain_dict}
