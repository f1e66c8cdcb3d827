"""Checks of a draft against headers, devices and memory. Each adds what cannot work to `problems`; none raises."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace

from distquant.config.resolve import is_known
from distquant.environment import Environment
from distquant.errors import InputError, Problem, Problems
from distquant.kernels.choice import Kernel
from distquant.model import EXPECTED, FLOATS, ROWS, STAR, ModelDescription, Param, Source, sources_by_expert
from distquant.options import ALL_REDUCE
from distquant.planning.expert_parallel import expert_name
from distquant.planning.load_plan import LoadPlan, RankMemory
from distquant.planning.plan_builder import Draft
from distquant.quantization import Context, Scheme, config_classes
from distquant.quantization.registry import discover
from distquant.sharding.device_map import is_offloaded, main_place, place_of
from distquant.units import format_bytes

TOLD = 20
"""Parameters that are named where many have a problem of the same kind; of more, the number is told."""


DENSE_FIX = "Use tp, and dp for replicas"

PLAIN = {"float64", "float32", "float16", "bfloat16", "int64", "bool"}
"""Dtypes of parameters and buffers that are what they say."""

OTHER_CHECKPOINT = "The checkpoint is of another model or method; check config.json"


def check_draft(draft: Draft, environment: Environment, mapped: bool, problems: Problems) -> None:
    """Everything that does not depend on the cuts.

    Args:
        draft: with skeleton, converted modules and device map.
        facts: the devices, as far as they are known.
        mapped: whether a device map was asked for.
        problems: gets what cannot work.
    """
    context = Context(
        environment=environment,
        mesh=draft.mesh,
        description=draft.description,
        device_map=draft.device_map,
        prequantized=draft.prequantized,
    )
    problems.extend(draft.scheme.validate(context))
    _check_mesh(draft, None if mapped else environment.device_count, problems)
    _check_experts(draft, problems)
    _check_missing(draft, problems)
    _check_devices(draft, environment.device_type, problems)
    _check_moved(draft, problems)
    weights, kept = {f"{name}.weight" for name in draft.converted}, set(draft.kept.weights)
    wrong = 0
    for name in draft.description.params:
        if name in draft.description.sources:
            found = list(_wrong_sources(draft, name, name in weights, name in kept))
            wrong += bool(found)
            problems.extend(found if wrong <= TOLD else ())
    if wrong > TOLD:
        what = f"{wrong - TOLD} more parameters cannot be filled from its tensors"
        problems.add(str(draft.checkpoint.path), what, OTHER_CHECKPOINT)


def _check_mesh(draft: Draft, devices: int | None, problems: Problems) -> None:
    mesh, description = draft.mesh, draft.description
    if mesh.ep > 1:
        problems.extend(_wrong_ep(draft))
    if mesh.tp > 1 and not description.tp_plan:
        what = f"{description.architecture} has no tensor-parallel plan, tp={mesh.tp} needs one"
        problems.add("mesh", what, "Use tp=1, or device_map='auto' over the devices of one process")
    if devices is not None and devices != mesh.size:
        what = f"{mesh} needs {mesh.size} ranks, there are {devices}"
        problems.add("mesh", what, f"Start {mesh.size} ranks, or give a mesh of {devices}")


def _wrong_ep(draft: Draft) -> Iterator[Problem]:
    """Why experts cannot be dealt out."""
    mesh, description = draft.mesh, draft.description
    if not description.experts and not description.unknown_experts:
        yield Problem("mesh", f"ep={mesh.ep}, and {description.architecture} has no experts", DENSE_FIX)
    fewest = min(description.experts.values(), key=lambda experts: experts.count, default=None)
    if fewest is not None and fewest.count < mesh.ep:
        what = f"ep={mesh.ep} ranks for the {fewest.count} experts of {fewest.name}"
        yield Problem("mesh", what, f"Use at most ep={fewest.count}; cut inside experts with tp")
    dense = next((experts for experts in description.experts.values() if experts.dense), None)
    if dense is not None and draft.dispatch != ALL_REDUCE:
        what = f"{draft.dispatch!r}, and {dense.name} is called with every token for every expert"
        yield Problem("dispatch", what, f"Use {ALL_REDUCE!r}")


def _check_experts(draft: Draft, problems: Problems) -> None:
    """Experts of a form that is not known cannot be quantized or dealt out; left as they are, they only cost memory."""
    description, selection = draft.description, draft.scheme.config.selection
    wanted = draft.scheme.stacks and not draft.prequantized
    for name, found in description.unknown_experts.items():
        if draft.mesh.ep > 1 or (wanted and selection.selects(name)):
            fix = f"Leave '.*{name.rpartition('.')[2]}' out of the modules to convert, and use ep=1"
            problems.add(name, f"{found} is no form of experts that is known, which is {EXPECTED}", fix)
    for name in draft.stacked:
        if place_of(draft.device_map or {}, name) == "disk":
            problems.add("device_map", f"{name} is mapped to disk, and experts cannot be offloaded", "Use cpu or a GPU")


def _check_missing(draft: Draft, problems: Problems) -> None:
    missing = draft.description.missing
    fix = "Download the checkpoint again, or check that config.json belongs to it"
    for name in missing[:TOLD]:
        what = f"the checkpoint has no tensor for it (shape {list(_shape_of(draft.description, name))})"
        problems.add(name, what, fix)
    if len(missing) > TOLD:
        what = f"{len(missing) - TOLD} more parameters have no tensor in it"
        problems.add(str(draft.checkpoint.path), what, fix)


def _shape_of(description: ModelDescription, name: str) -> tuple[int, ...]:
    """The shape of a parameter, which may be one expert's."""
    if name in description.params:
        return description.params[name].shape
    return description.params[re.sub(r"\.\d+(\.[^.]+\.[^.]+)$", rf".{STAR}\1", name)].shape[1:]


def _check_devices(draft: Draft, here: str | None, problems: Problems) -> None:
    device_map = draft.device_map or {}
    for name, source in draft.description.tied.items():
        mine, other = place_of(device_map, name), place_of(device_map, source)
        if mine != other and "disk" in (mine, other):
            what = f"{name} is tied to {source}, and they are mapped to {mine} and {other}"
            problems.add("device_map", what, "Map both to one device")
    for place in sorted(set(device_map.values())):
        if here is not None and place.partition(":")[0] not in ("cpu", "disk", here):
            what = f"{place!r} is given, and the devices here are of type {here!r}"
            problems.add("device_map", what, "Map the modules to devices that are there, or use 'auto'")


def _check_moved(draft: Draft, problems: Problems) -> None:
    """Modules that a device map has moved for each forward, where their method does not allow that."""
    device_map, scheme = draft.device_map or {}, draft.scheme
    if draft.dequantize or scheme.delegated:
        return
    for place, reason in scheme.unmoved.items():
        if is_offloaded(device_map, place):
            names = [name for name in draft.converted if place_of(device_map, name) == place]
            if names:
                others = f" and {len(names) - 1} more" if len(names) > 1 else ""
                beside = f" beside {main_place(device_map)}" if place == "cpu" else ""
                what = f"{names[0]}{others} of {scheme.name} cannot be on {place}{beside}: {reason}"
                problems.add("device_map", what, f"Map them to another device, or take a method of {_movable(place)}")


def _movable(place: str) -> str:
    """The methods whose modules may be in a place from which they are moved."""
    found = [name for name, scheme in discover().items() if not scheme.delegated and place not in scheme.unmoved]
    return ", ".join(name for name in found if not name.startswith("bitsandbytes"))


def _wrong_sources(draft: Draft, name: str, quantized: bool, kept: bool) -> Iterator[Problem]:
    """Why the checkpoint's tensors cannot fill a parameter."""
    param, sources = draft.description.params[name], draft.description.sources[name]
    linear = draft.description.linears.get(name.rpartition(".")[0])
    if linear is None or not linear.experts:
        logical = param.shape[::-1] if quantized and linear is not None and linear.transposed else param.shape
        yield from _wrong(draft, param, logical, sources, quantized, kept)
        return
    for source in sources:
        shape = draft.shapes[source.tensor]
        if source.offset is None and shape[:1] != (linear.experts,):
            what = f"{source.tensor} has shape {list(shape)}, the config has {linear.experts} experts"
            yield Problem(name, what, OTHER_CHECKPOINT)
            return
    seen = set()
    for number, own in enumerate(sources_by_expert(sources, linear.experts, draft.shapes)):
        infos = [(s.component, s.take is None, draft.taken(s), draft.checkpoint.tensors[s.tensor]) for s in own]
        kind = tuple((component, whole, count, info.shape, info.dtype) for component, whole, count, info in infos)
        if own and kind not in seen:  # experts are alike, and there may be thousands
            seen.add(kind)
            shape = param.shape[1:]
            stored = shape[::-1] if linear.transposed and len(shape) == 2 else shape
            one = replace(param, name=expert_name(name, number), shape=shape if quantized else stored)
            yield from _wrong(draft, one, shape, own, quantized, kept)


def _wrong(
    draft: Draft, param: Param, logical: tuple[int, ...], sources: tuple[Source, ...], quantized: bool, kept: bool
) -> Iterator[Problem]:
    name, tensors = param.name, draft.checkpoint.tensors
    infos = {source.component: tensors[source.tensor] for source in sources}
    shapes = {source.component: _taken_shape(source, tensors[source.tensor].shape) for source in sources}
    if (quantized and draft.prequantized) or draft.scheme.plain_row_block(name):
        yield from draft.scheme.check_stored(name, logical, shapes)
        yield from draft.scheme.check_dtypes(name, {component: info.dtype for component, info in infos.items()})
        return
    extra = sorted(component for component in infos if component)
    if extra:
        what = f"is stored quantized ({', '.join(extra)}), the config leaves it unquantized"
        yield Problem(name, what, OTHER_CHECKPOINT)
        return
    if not kept and param.dtype.startswith(("float", "bfloat")):
        found = [source.tensor for source in sources if tensors[source.tensor].dtype not in FLOATS]
        if found:
            others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            stored = f"{found[0]}{others} is stored as {tensors[found[0]].dtype}"
            of_experts = any(name.startswith(f"{module}.") for module in draft.description.experts)
            if draft.prequantized and of_experts and len(tensors[found[0]].shape) == 3:
                what = f"{stored}: experts that are quantized in one tensor are read in MXFP4's form only"
                yield Problem(name, what, "Take a checkpoint with a tensor for each expert, or an unquantized one")
            else:
                yield Problem(name, f"{stored}, which no quantization in config.json explains", OTHER_CHECKPOINT)
    for source in sources:
        if source.offset is not None and len(source.offset) > 1 and source.offset[-1] != 0:
            what = f"{source.tensor} is concatenated along the input dim, which cannot be streamed"
            yield Problem(name, what, "Convert the checkpoint with save_pretrained first")
    whole = len(sources) == 1 and sources[0].offset is None and sources[0].take is None
    shape = shapes[""]
    if (whole and shape != param.shape) or sum(map(draft.taken, sources)) != math.prod(param.shape):
        what = f"the checkpoint has shape {list(shape)}, the model {list(param.shape)}"
        yield Problem(name, what, OTHER_CHECKPOINT)
    elif quantized:
        yield from draft.scheme.check_weight(name, logical)


def _taken_shape(source: Source, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what a source takes; without the dim of one element that an expert is taken by."""
    if source.take is None:
        return shape
    dim, start, stop = source.take
    if dim == ROWS:
        return (stop - start, *shape[2:])
    if dim == 0 and stop - start == 1 and len(shape) > 1:
        return shape[1:]
    return (*shape[:dim], stop - start, *shape[dim + 1 :])


def check_rank_memory(
    draft: Draft, memory: tuple[RankMemory, ...], environment: Environment, problems: Problems
) -> None:
    """Whether every rank's finished shard and staging fit, with the arithmetic of the worst."""
    if environment.memory is None:
        return
    limit = draft.scheme.adjust_max_memory(environment.memory)
    short = [row for row in memory if row.peak > limit]
    if short:
        worst = max(short, key=lambda row: row.peak)
        what = (
            f"needs {format_bytes(worst.quantized)} quantized + {format_bytes(worst.unquantized)} unquantized "
            f"+ {format_bytes(worst.staging)} staging = {format_bytes(worst.peak)}, and "
            f"{format_bytes(limit)} of {format_bytes(environment.memory)} ({environment.memory_source}) may be used"
        )
        others = f" (and {len(short) - 1} more)" if len(short) > 1 else ""
        fix = "Use more ranks, a smaller staging, fewer bits, or more memory"
        problems.add(f"rank {worst.rank}{others}", what, fix)


def check_kernel(plan: LoadPlan, scheme: Scheme, kernel: Kernel) -> None:
    """Raises `InputError` where the library bitsandbytes shall quantize by a method that it does not know."""
    if kernel is Kernel.BITSANDBYTES and plan.converted and not plan.prequantized and not scheme.by_bitsandbytes:
        what = f"'bitsandbytes' has no kernels for {scheme.name}"
        raise InputError.one("kernel", what, "Take 'auto', 'cpu', 'triton' or 'reference'")


def check_supported(plan: LoadPlan) -> None:
    """Raises `InputError` for a plan that keeps weights as a method stores them that has no scheme here.

    Such a plan (`on_unsupported="skip"`) is to be read: values without their scales are wrong.
    """
    method = plan.quantization_config["quant_method"]
    stored = [f"{tensor.name} ({tensor.dtype})" for tensor in plan.tensors if tensor.dtype not in PLAIN]
    known = is_known(plan.quantization_config, config_classes())
    delegated = any(scheme.delegated and scheme.config_class.is_for(method) for scheme in discover().values())
    if plan.converted or not stored or (known and (delegated or not plan.prequantized)):
        return
    what = (
        f"weights are stored quantized with {method!r}, which cannot be loaded here, and without it their values are "
        f"wrong: {len(stored)} tensors, {', '.join(stored[:3])}{', ...' if len(stored) > 3 else ''}"
    )
    fix = "A plan with on_unsupported='skip' is for reading: load an unquantized checkpoint of this model"
    raise InputError.one("on_unsupported", what, fix)
