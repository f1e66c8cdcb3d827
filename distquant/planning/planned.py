"""The last stage of planning: sizes of every rank, and the plan that is frozen from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from distquant.config import QuantizationConfig
from distquant.environment import Environment
from distquant.planning import runtime_memory
from distquant.planning.described import fields_of
from distquant.planning.generation_memory import Estimates
from distquant.planning.load_plan import LoadPlan, RankMemory
from distquant.planning.node_rows import PieceSizes
from distquant.planning.notes import notes_on
from distquant.planning.plan_builder import Partitioned
from distquant.planning.slots import load_buffer_bytes


@dataclass(frozen=True, kw_only=True)
class Planned(Partitioned):
    """A partitioned load, and the memory that it takes."""

    memory: tuple[RankMemory, ...]
    """A row a rank."""
    load_buffer: int
    """Bytes of all slots that weights pass through on a rank, as the engine makes them."""
    load_workspace: int
    """Bytes that a rank needs beside these slots, until the tensors that take them are finished."""


def plan_memory(partitioned: Partitioned) -> Planned:
    """Adds the memory table.

    Raises:
        InputError: a checkpoint stores a component in another size than its method's layout has.
    """
    sizes = PieceSizes(partitioned.checkpoint.tensors)
    memory = tuple(partitioned.memory_rows(sizes.add_node))
    buffer = workspace = 0
    if not partitioned.scheme.delegated:  # else transformers loads, and has no slots
        buffer = load_buffer_bytes(partitioned.staging, sizes.smallest)
        # Tensors pass one at a time, so the largest need of any counts once.
        needs = [nbytes for _, nbytes in partitioned.whole_weights()]
        needs += partitioned.encoded_buffers(partitioned.kinds())
        workspace = max(needs, default=0) + sizes.statistics(partitioned.staging)
    return Planned(**fields_of(partitioned), memory=memory, load_buffer=buffer, load_workspace=workspace)


def freeze(
    planned: Planned,
    dtype: str,
    environment: Environment,
    trust_remote_code: bool,
    attn_implementation: str | None,
    estimates: Estimates,
) -> LoadPlan:
    """Returns the plan that every rank gets.

    Args:
        planned: a load without problems.
        dtype: torch's name of the dtype that the model is loaded in.
        environment: what the plan was made for.
        trust_remote_code: True if ranks may run the checkpoint's code.
        attn_implementation: the attention that was asked for.
        estimates: of the memory of each device.
    """
    config, parallel = planned.scheme.config, planned.parallel
    # A skipped method's weights stay as it stores them, so the plan names that method and not `none`.
    as_stored = bool(planned.kept.weights)
    return LoadPlan(
        model=str(planned.checkpoint.path),
        model_type=planned.description.model_type,
        architecture=planned.description.architecture,
        mesh=planned.mesh,
        dtype=dtype,
        quantization_config=planned.skipped if as_stored and planned.skipped else config.to_dict(),
        selection=_selection(config),
        prequantized=planned.prequantized or as_stored,
        dequantize=planned.dequantize,
        tensors=planned.tensors,
        tied=planned.description.tied,
        partitions=parallel.partitions,
        heads=parallel.heads,
        modules=parallel.modules,
        attentions=parallel.attentions,
        experts=parallel.experts,
        dispatch=planned.dispatch,
        converted=planned.converted,
        rules=tuple(parallel.rules),
        notes=(*notes_on(planned), *_differing(environment), *runtime_memory.notes(planned.mesh, environment)),
        memory=planned.memory,
        staging=planned.staging,
        nodes=planned.nodes,
        device_map=planned.device_map,
        shards=planned.checkpoint.digests(),
        check_at_load=tuple(_unknown(planned, environment)),
        environment=environment,
        trust_remote_code=trust_remote_code,
        attn_implementation=attn_implementation,
        estimates=estimates,
    )


def _unknown(planned: Planned, environment: Environment) -> Iterator[str]:
    """Yields what the plan had to assume, and each rank checks when it loads."""
    if environment.device_type is None:
        yield "device type and count" if environment.capability else "device type, capability and count"
    if environment.memory is None and planned.device_map is None:
        yield "memory of each rank (declare it with max_memory)"
    if not environment.nodes and planned.mesh.size > 1:
        most = max(Counter(planned.nodes).values())
        yield f"which ranks share a node ({most} each, as planned)"


def _differing(environment: Environment) -> Iterator[str]:
    """Yields a note if ranks have GPUs of different kinds: the plan is for the weakest."""
    if environment.differing:
        named = ", ".join(f"{major}.{minor}" for major, minor in environment.differing)
        yield f"devices differ: compute capabilities {named}; the plan is for the lowest"


def _selection(config: QuantizationConfig) -> dict[str, Any]:
    """Returns the options about which modules to convert that Hugging Face's configuration lacks."""
    shared = config.to_dict()
    return {key: value for key, value in config.to_dict(extras=True).items() if key not in shared}
