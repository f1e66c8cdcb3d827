"""Checks of each stage of planning against headers, devices and memory.

Those of stages add what cannot work to `problems`, so that all of it is reported at once. Those of a finished plan, at
load, raise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distquant.config.resolve import is_known
from distquant.environment import Environment
from distquant.errors import InputError, Problem, Problems
from distquant.kernels.choice import Kernel
from distquant.model import EXPECTED
from distquant.options import ALL_REDUCE
from distquant.planning.described import Described
from distquant.planning.device_map import check_memory, memory_limits
from distquant.planning.generation_memory import Estimates
from distquant.planning.group_checks import check_groups
from distquant.planning.load_plan import LoadPlan
from distquant.planning.missing import missing_problems
from distquant.planning.plan_builder import Partitioned
from distquant.planning.planned import Planned
from distquant.planning.source_checks import check_sources
from distquant.planning.summary import change_text
from distquant.quantization import Context, Scheme, config_classes, refused_config
from distquant.quantization.registry import discover
from distquant.sharding.device_map import is_offloaded, main_place, place_of
from distquant.sharding.mesh import world_problem
from distquant.units import format_bytes

PLAIN = {"float64", "float32", "float16", "bfloat16", "int64", "bool"}
"""Dtypes of parameters and buffers whose values mean themselves, without a scale."""

DENSE_FIX = "Use tp, and dp for replicas"


def check_described(described: Described, environment: Environment, has_device_map: bool, problems: Problems) -> bool:
    """Checks everything that does not depend on how weights are divided.

    Returns False where the way in which weights are stored is not supported, so that nothing more is known of them.

    Args:
        described: the load.
        environment: the devices, as far as they are known.
        has_device_map: True if the user gave a device map, valid or not.
        problems: gets what cannot work.
    """
    context = Context(
        environment=environment,
        mesh=described.mesh,
        description=described.description,
        device_map=described.device_map,
        prequantized=described.prequantized,
    )
    refusals = described.scheme.validate(context)
    if not refusals and not described.dequantize:
        refusals = list(refused_config(described.scheme.config))
    problems.extend(refusals)
    refused = described.prequantized and described.scheme.unsupported_form(refusals)
    # With a device map one process uses many devices, so their number says nothing about ranks.
    _check_mesh(described, None if has_device_map else environment.device_count, problems)
    _check_experts(described, problems)
    _check_missing(described, refused, problems)
    _check_devices(described, environment.device_type, problems)
    _check_offloaded(described, problems)
    check_groups(described, problems)
    check_sources(described, refused, problems)
    return not refused


def _check_mesh(described: Described, devices: int | None, problems: Problems) -> None:
    mesh, description = described.mesh, described.description
    if mesh.ep > 1:
        problems.extend(_expert_parallel_problems(described))
    if mesh.tp > 1 and not description.tp_plan:
        problem = f"{description.architecture} has no tensor-parallel plan, tp={mesh.tp} needs one"
        problems.add("mesh", problem, "Use tp=1, or device_map='auto' over the devices of one process")
    if devices is not None and (wrong := world_problem(mesh, devices)) is not None:
        problems.extend([wrong])


def _expert_parallel_problems(described: Described) -> Iterator[Problem]:
    """Yields reasons why experts cannot be distributed over ep."""
    mesh, description = described.mesh, described.description
    if not description.experts and not description.unknown_experts:
        yield Problem("mesh", f"ep={mesh.ep}, and {description.architecture} has no experts", DENSE_FIX)
    fewest = min(description.experts.values(), key=lambda experts: experts.count, default=None)
    if fewest is not None and fewest.count < mesh.ep:
        problem = f"ep={mesh.ep} ranks for the {fewest.count} experts of {fewest.name}"
        yield Problem("mesh", problem, f"Use at most ep={fewest.count}; split inside experts with tp")
    dense = next((experts for experts in description.experts.values() if experts.dense), None)
    if dense is not None and described.dispatch != ALL_REDUCE:
        problem = f"{described.dispatch!r}, and {dense.name} is called with every token for every expert"
        yield Problem("dispatch", problem, f"Use {ALL_REDUCE!r}")


def _check_experts(described: Described, problems: Problems) -> None:
    description, selection = described.description, described.scheme.config.selection
    # Left as they are, experts of unknown form only cost memory; quantized or distributed they cannot be.
    quantizes = described.scheme.stacks and not described.prequantized
    for name, form in description.unknown_experts.items():
        if described.mesh.ep > 1 or (quantizes and selection.selects(name)):
            fix = f"Leave '.*{name.rpartition('.')[2]}' out of the modules to convert, and use ep=1"
            problems.add(name, f"unknown form of experts: {form}; expected {EXPECTED}", fix)
    for name in described.stacked:
        if place_of(described.device_map or {}, name) == "disk":
            problem = f"{name} is mapped to disk, and experts cannot be offloaded"
            problems.add("device_map", problem, "Use cpu or a GPU")


def _check_missing(described: Described, refused: bool, problems: Problems) -> None:
    linears = described.description.linears
    # Tensors of a form that is not supported have no place, so their weights only seem to be missing.
    missing = [n for n in described.description.missing if not refused or n.rpartition(".")[0] not in linears]
    problems.extend(missing_problems(described, missing))
    if described.scheme.delegated:
        for note in described.checkpoint.read_otherwise:
            fix = "Save the checkpoint once with transformers, or repair the index"
            problems.add(str(described.checkpoint.path), f"{note}; transformers, which loads here, does not", fix)


def _check_devices(described: Described, device_type: str | None, problems: Problems) -> None:
    device_map = described.device_map or {}
    for name, source in described.description.tied.items():
        device, other = place_of(device_map, name), place_of(device_map, source)
        if device != other and "disk" in (device, other):
            problem = f"{name} is tied to {source}, and they are mapped to {device} and {other}"
            problems.add("device_map", problem, "Map both to one device")
    for device in sorted(set(device_map.values())):
        if device_type is not None and device.partition(":")[0] not in ("cpu", "disk", device_type):
            problem = f"{device!r} is given, and the devices here are of type {device_type!r}"
            problems.add("device_map", problem, "Map the modules to devices that are there, or use 'auto'")


def _check_offloaded(described: Described, problems: Problems) -> None:
    """Checks that the method lets its modules be offloaded, which moves their components for each forward."""
    device_map, scheme = described.device_map or {}, described.scheme
    if described.dequantize or scheme.delegated:
        return
    for place, reason in scheme.unmoved.items():
        names = [name for name in described.converted if place_of(device_map, name) == place]
        if names and is_offloaded(device_map, place):
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            beside = f" beside {main_place(device_map)}" if place == "cpu" else ""
            problem = f"{names[0]}{others} of {scheme.name} cannot be on {place}{beside}: {reason}"
            fix = f"Map them to another device, or take a method of {_offloadable(place)}"
            problems.add("device_map", problem, fix)


def _offloadable(place: str) -> str:
    """Returns the methods whose modules may be offloaded to a place."""
    schemes = discover().items()
    names = [name for name, scheme in schemes if not scheme.delegated and place not in scheme.unmoved]
    return ", ".join(name for name in names if not name.startswith("bitsandbytes"))


def check_rank_memory(
    planned: Planned, environment: Environment, problems: Problems, estimates: Estimates | None = None
) -> None:
    """Checks that every rank can load; reports the arithmetic of the worst rank.

    Args:
        planned: the load.
        environment: the devices, as far as they are known.
        problems: gets the arithmetic.
        estimates: with the changes of the request that make it fit.
    """
    if environment.memory is None:
        return
    limit = planned.scheme.adjust_max_memory(environment.memory)
    beside = planned.load_buffer + planned.load_workspace
    short = [row for row in planned.memory if row.finished + beside > limit]
    if short:
        worst = max(short, key=lambda row: row.finished)
        terms = {
            "quantized": worst.quantized,
            "unquantized": worst.unquantized,
            "load buffer": planned.load_buffer,
            "for tensors in progress": planned.load_workspace,
        }
        shown = [f"{format_bytes(n)} {name}" for name, n in terms.items() if n or "quantized" in name]
        problem = (
            f"needs {' + '.join(shown)} = {format_bytes(worst.finished + beside)}, and "
            f"{format_bytes(limit)} of {format_bytes(environment.memory)} ({environment.memory_source}) may be used"
        )
        others = f" (and {len(short) - 1} more)" if len(short) > 1 else ""
        fix = "Use more ranks, a smaller load buffer (staging), fewer bits, or more memory"
        if estimates is not None and estimates.alternatives:
            fix = change_text(estimates)
        problems.add(f"rank {worst.rank}{others}", problem, fix)


def check_device_memory(
    partitioned: Partitioned, device_map: Mapping[str, str], max_memory: Any, problems: Problems
) -> None:
    """Checks that no device of a map gets more than `max_memory`; raises `InputError` for invalid sizes."""
    # A device map is for one process, whose positions on tp and ep are 0.
    sizes = ((tensor.name, partitioned.local_size(tensor, tp=0)[1]) for tensor in partitioned.tensors)
    check_memory(sizes, device_map, memory_limits(max_memory, device_map), problems)


def check_kernel(plan: LoadPlan, scheme: Scheme, kernel: Kernel) -> None:
    """Raises `InputError` if the library bitsandbytes is to quantize by a method that it does not have."""
    if kernel is Kernel.BITSANDBYTES and plan.converted and not plan.prequantized and not scheme.by_bitsandbytes:
        problem = f"'bitsandbytes' has no kernels for {scheme.name}"
        raise InputError.one("kernel", problem, "Take 'auto', 'cpu', 'triton' or 'reference'")


def check_supported(plan: LoadPlan) -> None:
    """Raises `InputError` for a plan that keeps weights as a method stores them that has no scheme here.

    Such a plan (`on_unsupported="skip"`) is to be read: values without their scales are wrong.
    """
    method = plan.quantization_config["quant_method"]
    stored = [f"{tensor.name} ({tensor.dtype})" for tensor in plan.tensors if tensor.dtype not in PLAIN]
    is_delegated = any(scheme.delegated and scheme.config_class.is_for(method) for scheme in discover().values())
    # Some scheme here, or transformers' own quantizer, gives those values their meaning.
    is_loadable = is_known(plan.quantization_config, config_classes()) and (is_delegated or not plan.prequantized)
    if plan.converted or not stored or is_loadable:
        return
    problem = (
        f"weights are stored quantized with {method!r}, which cannot be loaded here, and without it their values are "
        f"wrong: {len(stored)} tensors, {', '.join(stored[:3])}{', ...' if len(stored) > 3 else ''}"
    )
    fix = "A plan with on_unsupported='skip' is for reading: load an unquantized checkpoint of this model"
    raise InputError.one("on_unsupported", problem, fix)
