"""Checks of a draft against headers, devices and memory. Each adds what cannot work to `problems`; none raises."""

from __future__ import annotations

import math

from distquant.device_map import place_of
from distquant.draft import Draft
from distquant.errors import Problems
from distquant.facts import Facts, format_bytes
from distquant.planning.load_plan import RankMemory
from distquant.schemes import Context

TOLD_MISSING = 20
"""Missing parameters that are named; of more, the number is told."""

FLOATS = {"F64", "F32", "F16", "BF16"}
"""Checkpoint dtypes that need no scheme to be read."""


def check_draft(draft: Draft, facts: Facts, mapped: bool, problems: Problems) -> None:
    """Everything that does not depend on the cuts.

    Args:
        draft: with skeleton, converted modules and device map.
        facts: the devices, as far as they are known.
        mapped: whether a device map was asked for.
        problems: gets what cannot work.
    """
    context = Context(
        facts=facts,
        mesh=draft.mesh,
        skeleton=draft.skeleton,
        device_map=draft.device_map,
        prequantized=draft.prequantized,
    )
    problems.extend(draft.scheme.validate(context))
    _check_mesh(draft, None if mapped else facts.device_count, problems)
    _check_missing(draft, problems)
    _check_devices(draft, facts.device_type, problems)
    weights = {f"{name}.weight" for name in draft.converted}
    for name in draft.skeleton.params:
        if name in draft.skeleton.sources:
            _check_sources(draft, name, name in weights, problems)


def _check_mesh(draft: Draft, devices: int | None, problems: Problems) -> None:
    mesh, skeleton = draft.mesh, draft.skeleton
    if mesh.ep > 1:
        rules = len(draft.scheme.update_ep_plan(dict(skeleton.ep_plan)))
        kind = "has no experts"
        if skeleton.experts:
            kind = f"has an expert plan of {rules} rules, but expert parallelism comes later"
        what = f"ep={mesh.ep}, and {skeleton.architecture} {kind}"
        problems.add("mesh", what, "Use tp, and dp for replicas")
    if mesh.tp > 1 and not skeleton.tp_plan:
        what = f"{skeleton.architecture} has no tensor-parallel plan, tp={mesh.tp} needs one"
        problems.add("mesh", what, "Use tp=1, or device_map='auto' over the devices of one process")
    if devices is not None and devices != mesh.size:
        what = f"{mesh} needs {mesh.size} ranks, there are {devices}"
        problems.add("mesh", what, f"Start {mesh.size} ranks, or give a mesh of {devices}")


def _check_missing(draft: Draft, problems: Problems) -> None:
    missing = draft.skeleton.missing
    fix = "Download the checkpoint again, or check that config.json belongs to it"
    for name in missing[:TOLD_MISSING]:
        what = f"the checkpoint has no tensor for it (shape {list(draft.skeleton.params[name].shape)})"
        problems.add(name, what, fix)
    if len(missing) > TOLD_MISSING:
        what = f"{len(missing) - TOLD_MISSING} more parameters have no tensor in it"
        problems.add(str(draft.checkpoint.path), what, fix)


def _check_devices(draft: Draft, here: str | None, problems: Problems) -> None:
    device_map = draft.device_map or {}
    for name, source in draft.skeleton.tied.items():
        mine, other = place_of(device_map, name), place_of(device_map, source)
        if mine != other and "disk" in (mine, other):
            what = f"{name} is tied to {source}, and they are mapped to {mine} and {other}"
            problems.add("device_map", what, "Map both to one device")
    for place in sorted(set(device_map.values())):
        if here is not None and place.partition(":")[0] not in ("cpu", "disk", here):
            what = f"{place!r} is given, and the devices here are of type {here!r}"
            problems.add("device_map", what, "Map the modules to devices that are there, or use 'auto'")


def _check_sources(draft: Draft, name: str, quantized: bool, problems: Problems) -> None:
    """Whether the checkpoint's tensors can fill a parameter."""
    param, sources, tensors = draft.skeleton.params[name], draft.skeleton.sources[name], draft.checkpoint.tensors
    infos = {source.component: tensors[source.tensor] for source in sources}
    fix = "The checkpoint is of another model or method; check config.json"
    if quantized and draft.prequantized:
        stored = {component: info.shape for component, info in infos.items()}
        problems.extend(draft.scheme.check_stored(name, param.shape, stored))
        return
    extra = sorted(component for component in infos if component)
    if extra:
        problems.add(name, f"is stored quantized ({', '.join(extra)}), the config leaves it unquantized", fix)
        return
    for source in sources:
        dtype = tensors[source.tensor].dtype
        if dtype not in FLOATS and param.dtype.startswith(("float", "bfloat")):
            what = f"{source.tensor} is stored as {dtype}, which no quantization in config.json explains"
            problems.add(name, what, fix)
        if source.offset is not None and len(source.offset) > 1 and source.offset[-1] != 0:
            what = f"{source.tensor} is concatenated along the input dim, which cannot be streamed"
            problems.add(name, what, "Convert the checkpoint with save_pretrained first")
    whole = len(sources) == 1 and sources[0].offset is None and sources[0].take is None
    shape = infos[""].shape
    if (whole and shape != param.shape) or sum(map(draft.taken, sources)) != math.prod(param.shape):
        problems.add(name, f"the checkpoint has shape {list(shape)}, the model {list(param.shape)}", fix)
    elif quantized:
        problems.extend(draft.scheme.check_weight(name, param.shape))


def check_rank_memory(draft: Draft, memory: tuple[RankMemory, ...], facts: Facts, problems: Problems) -> None:
    """Whether every rank's finished shard and staging fit, with the arithmetic of the worst."""
    if facts.memory is None:
        return
    limit = draft.scheme.adjust_max_memory(facts.memory)
    short = [row for row in memory if row.peak > limit]
    if short:
        worst = max(short, key=lambda row: row.peak)
        what = (
            f"needs {format_bytes(worst.quantized)} quantized + {format_bytes(worst.unquantized)} unquantized "
            f"+ {format_bytes(worst.staging)} staging = {format_bytes(worst.peak)}, and "
            f"{format_bytes(limit)} of {format_bytes(facts.memory)} ({facts.memory_source}) may be used"
        )
        others = f" (and {len(short) - 1} more)" if len(short) > 1 else ""
        fix = "Use more ranks, a smaller staging, fewer bits, or more memory"
        problems.add(f"rank {worst.rank}{others}", what, fix)
