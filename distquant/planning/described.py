"""The first stage of planning: a checkpoint, its method and its model as plain data, and which modules are converted.

Nothing is divided over ranks yet. The device map belongs to this stage, because modules that it offloads may stay
unquantized: without it, nobody knows which modules are converted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from distquant.checkpoint import Checkpoint
from distquant.config import GgufConfig, Merged, NoneConfig, detect
from distquant.config.resolve import lists_modules
from distquant.environment import Environment
from distquant.errors import Problems
from distquant.model import (
    STAR,
    GgufNames,
    ModelDescription,
    ModuleNames,
    Placer,
    QuantizedTensors,
    Source,
    as_stored,
    check_merged_components,
    describe_model,
    gguf_names,
    source_numel,
    split_experts,
    with_gguf_sources,
)
from distquant.planning.device_map import infer_device_map, memory_by_device
from distquant.planning.elsewhere import Elsewhere, absent_faults, find_elsewhere
from distquant.planning.prepared import Prepared
from distquant.planning.read_assignment import nodes_of
from distquant.planning.request import Given, Request
from distquant.planning.stored_modules import StoredModules, disagreements, stored_modules
from distquant.quantization import Scheme, Shard, scheme_for
from distquant.sharding.mesh import Mesh


@dataclass(frozen=True, kw_only=True)
class Described:
    """A load as it is known before its weights are divided over ranks."""

    checkpoint: Checkpoint
    scheme: Scheme
    mesh: Mesh
    staging: int
    """Bytes that each rank may use beside its weights, as asked for."""
    nodes: tuple[int, ...]
    """The node of each rank."""
    dispatch: str
    """How tokens reach experts on other ranks of ep."""
    prequantized: bool
    """True if the checkpoint stores weights quantized by the scheme."""
    dequantize: bool
    """True if stored quantized weights become ordinary ones."""
    description: ModelDescription
    """The model, with stacks of experts in place of the parameters of the modules in `stacked`."""
    stacked: tuple[str, ...]
    """Modules of fused experts that are split into stacks."""
    skipped: dict[str, Any] | None
    """The checkpoint's quantization config, where its method is left out."""
    kept: QuantizedTensors
    """Weights that are then planned as they are stored."""
    converted: tuple[str, ...]
    """Modules that the scheme replaces."""
    otherwise: tuple[str, ...]
    """Notes on modules that the checkpoint does not store as its config says."""
    elsewhere: tuple[Elsewhere, ...]
    """Tensors that seem to be missing, and are under other names or in files that were not read."""
    offloaded: frozenset[str]
    """Modules that the scheme would replace, but the device map leaves unquantized."""
    device_map: dict[str, str] | None
    sizes_known: bool
    """False if the request or a tensor was not understood: sizes that follow from a guess would mislead."""

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each checkpoint tensor."""
        return {name: info.shape for name, info in self.checkpoint.tensors.items()}

    def taken(self, source: Source) -> int:
        """Elements of a checkpoint tensor that a source takes."""
        return source_numel(source, self.checkpoint.tensors[source.tensor].shape)


def fields_of(stage: Described) -> dict[str, Any]:
    """Returns the fields of a stage, for the stage that adds to them."""
    # Not `vars`: that has the cached properties as well. Not `asdict`: that copies 90,000 tensors.
    return {field.name: getattr(stage, field.name) for field in fields(stage)}


def describe(
    request: Request,
    given: Given,
    environment: Environment,
    prepared: Prepared,
    merged: Merged,
    skipped: dict[str, Any] | None,
    problems: Problems,
) -> Described:
    """Describes a load.

    Args:
        request: as the user gave it.
        given: the request, as far as it could be read.
        environment: the devices, as far as they are known.
        prepared: checkpoint and model.
        merged: the configuration to load with.
        skipped: the checkpoint's quantization config, where its method is left out.
        problems: gets tensors without a place, patterns without a module, and an invalid device map.
    """
    mesh, checkpoint = given.mesh, prepared.checkpoint
    listed = merged.prequantized and lists_modules(given.config, checkpoint.config, merged)
    placement = _place_tensors(prepared, merged, skipped, mesh, request.on_unsupported, problems)
    sizes_known = not problems
    selected = _select(placement, mesh, checkpoint, listed, problems)
    device_map = _device_map(request, environment, mesh, prepared.model, placement, selected, problems)
    offloaded = frozenset[str]()
    if device_map is not None:
        offloaded = frozenset(placement.scheme.offloaded(selected.converted, device_map))
    measured = len(environment.nodes) == mesh.size  # else it was measured for another mesh, or not at all
    return Described(
        checkpoint=checkpoint,
        scheme=placement.scheme,
        mesh=mesh,
        staging=given.staging,
        nodes=environment.nodes if measured else nodes_of(mesh.size, request.ranks_per_node),
        dispatch=given.dispatch,
        prequantized=placement.merged.prequantized,
        dequantize=placement.dequantize,
        description=selected.description,
        stacked=selected.stacked,
        skipped=placement.skipped,
        kept=selected.kept,
        converted=tuple(name for name in selected.converted if name not in offloaded),
        otherwise=selected.otherwise,
        elsewhere=placement.elsewhere,
        offloaded=offloaded,
        device_map=device_map,
        sizes_known=sizes_known,
    )


# -- tensors -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Placement:
    """The checkpoint's tensors, placed in the model by the names that a method gives them."""

    scheme: Scheme
    merged: Merged
    skipped: dict[str, Any] | None
    description: ModelDescription
    """With experts as the model's own parameters."""
    stackable: tuple[str, ...]
    """Modules of experts that may be split into stacks."""
    shapes: Mapping[str, tuple[int, ...]]
    gguf: GgufNames | None
    elsewhere: tuple[Elsewhere, ...]
    """Tensors that seem to be missing, and are under other names or in files that were not read."""

    @property
    def dequantize(self) -> bool:
        """True if stored quantized weights become ordinary ones here; transformers does that itself if it loads."""
        return self.merged.dequantize and not self.scheme.delegated

    def split(self, modules: tuple[str, ...]) -> ModelDescription:
        """Returns the description with these modules of experts as stacks."""
        return split_experts(self.description, modules, self.shapes)


def _place_tensors(
    prepared: Prepared,
    merged: Merged,
    skipped: dict[str, Any] | None,
    mesh: Mesh,
    on_unsupported: str,
    problems: Problems,
) -> _Placement:
    """Places the checkpoint's tensors; without the method if it cannot place them and the user asked to skip it."""
    checkpoint, model = prepared.checkpoint, prepared.model
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    config, gguf = merged.config, None
    if isinstance(config, GgufConfig) and checkpoint.types:
        # A GGUF file has llama.cpp's names, and each tensor its own type: the method's layout depends on both.
        gguf = gguf_names(model, checkpoint.tensors, checkpoint.architecture)
        types = {param: checkpoint.types[name] for name, param in gguf.params.items()}
        config = replace(config, types=types, interleaved=gguf.interleaved)
        shapes = {gguf.params.get(name, name): shape for name, shape in shapes.items()}
    scheme = scheme_for(config)
    if merged.prequantized:
        merged = merged._replace(config=scheme.config_as_stored(checkpoint.tensors))
        scheme = scheme_for(merged.config)
    # Beside fused experts a component's suffix is glued to the parameter's name, which the star stands for.
    fused = {STAR + suffix: component for suffix, component in scheme.fused_suffixes.items()}
    suffixes = {**scheme.suffixes, **fused} if merged.prequantized else {}
    unplaced = Problems()
    description = describe_model(model, shapes, suffixes, unplaced)
    stackable = tuple(description.experts) if scheme.stacks or _is_divided(mesh) else ()
    # Stacks take the components of single experts one by one; only what would stay merged cannot be loaded.
    merged_parts = {n: parts for n, parts in description.parts.items() if n.rpartition(".")[0] not in stackable}
    check_merged_components(merged_parts, unplaced)
    if unplaced and merged.prequantized and on_unsupported == "skip":
        description = describe_model(model, shapes, {}, problems)
        merged, skipped = Merged(NoneConfig(), False), detect(checkpoint.config)
        scheme = scheme_for(merged.config)
        stackable = tuple(description.experts) if _is_divided(mesh) else ()
    else:
        problems.extend(unplaced)
    placer = Placer(model, description.params, suffixes)
    if checkpoint.absent and (faults := absent_faults(checkpoint, description, placer)):
        problems.extend(faults)
        problems.raise_if_any()  # what follows from files that are not there is no further problem
    return _Placement(
        scheme=scheme,
        merged=merged,
        skipped=skipped,
        description=description,
        stackable=stackable,
        shapes=shapes,
        gguf=gguf,
        elsewhere=find_elsewhere(checkpoint, description, placer) if description.missing else (),
    )


def _is_divided(mesh: Mesh) -> bool:
    """Returns True if ranks hold different parts of the model."""
    return mesh.ep * mesh.tp > 1


# -- modules -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Selected:
    """The modules to convert, and the description in which they have the form to be converted."""

    converted: list[str]
    stacked: tuple[str, ...]
    description: ModelDescription
    kept: QuantizedTensors
    otherwise: tuple[str, ...]
    """Notes on modules that the checkpoint does not store as its config says."""


def _select(
    placement: _Placement, mesh: Mesh, checkpoint: Checkpoint, listed_by_user: bool, problems: Problems
) -> _Selected:
    """Selects the modules to convert, before a device map may leave some out."""
    scheme, prequantized, stacked = placement.scheme, placement.merged.prequantized, placement.stackable
    description, kept = placement.split(stacked), QuantizedTensors()
    scheme.names = ModuleNames(description.sources, prequantized)
    if prequantized:
        stored = stored_modules(description, scheme, checkpoint.tensors, listed_by_user)
    else:
        stored = StoredModules(tuple(_selected(description, scheme, problems)))
    converted = [name for name in stored.converted if scheme.stacks or STAR not in name]
    if not _is_divided(mesh):
        # On one rank only converted experts must be stacks. Where none is converted, the model's own module stays, and
        # with it transformers' own way to run it.
        modules = {name.partition(f".{STAR}.")[0] for name in converted if STAR in name}
        stacked = tuple(name for name in stacked if name in modules)
        if stacked != placement.stackable:
            description = placement.split(stacked)
    if placement.gguf is not None:
        description = with_gguf_sources(description, placement.gguf)
    if placement.skipped is not None or (scheme.delegated and prequantized):
        # Nothing here reads these weights' form, so they keep it. A packed weight is then no linear module's any more.
        description, kept = as_stored(description, checkpoint.tensors)
        converted = [name for name in converted if name in description.linears]
    return _Selected(
        converted=converted, stacked=stacked, description=description, kept=kept, otherwise=tuple(disagreements(stored))
    )


def _selected(description: ModelDescription, scheme: Scheme, problems: Problems) -> list[str]:
    """Returns the modules to convert. A tied weight is never converted, because it is also an embedding's."""
    stacks = [name for name, linear in description.linears.items() if linear.experts]
    leaves = _leaves((*description.modules, *stacks))
    known = dict.fromkeys((*leaves, *(one for name in description.linears for one in scheme.names.of(name))))
    problems.extend(scheme.config.selection.unmatched(known))
    # Of tied parameters the description has only the source, so the other's module has no weight there.
    return [name for name in scheme.select_modules(description) if f"{name}.weight" in description.params]


def _leaves(modules: tuple[str, ...]) -> list[str]:
    """Returns the modules without children: a pattern that matches only a container would convert nothing."""
    parents = {name.rpartition(".")[0] for name in modules}
    return [name for name in modules if name not in parents]


# -- devices -----------------------------------------------------------------------------------------------------------


def _device_map(
    request: Request,
    environment: Environment,
    mesh: Mesh,
    model: Any,
    placement: _Placement,
    selected: _Selected,
    problems: Problems,
) -> dict[str, str] | None:
    """Returns the complete device map, inferred from the sizes that converted modules will have."""
    asked, scheme, description = request.device_map, placement.scheme, selected.description
    if asked is None:
        return None
    if mesh.size > 1:
        problem = f"given together with mesh {mesh} ({mesh.size} ranks)"
        problems.add("device_map", problem, "Use a mesh to split the model, or a device_map in one process")
        return None

    def nbytes(name: str) -> int:
        linear, weight = description.linears[name], description.params[f"{name}.weight"]
        shard = Shard(f"{name}.weight", (linear.out_features, linear.in_features), weight.dtype)
        return scheme.shard_nbytes(shard) * max(linear.experts, 1)

    sizes = {} if placement.dequantize else {name: nbytes(name) for name in selected.converted}
    asked = scheme.update_device_map(asked) if isinstance(asked, dict) else asked
    max_memory = memory_by_device(request.max_memory, environment.device_type)
    kind = environment.device_type
    return infer_device_map(model, asked, max_memory, sizes, scheme.adjust_max_memory, problems, kind)
