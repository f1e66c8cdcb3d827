"""Estimates of a planned load: what each device holds, and what keeps a request from fitting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from distquant.dtypes import DTYPE_BYTES
from distquant.environment import Environment
from distquant.model import CacheLayer, Decoder
from distquant.model.cache import FLOAT32
from distquant.planning.device_map import memory_limits
from distquant.planning.expert_parallel import first_expert
from distquant.planning.generation_memory import USUAL_CONTEXT, CacheGroup, Device, Estimates
from distquant.planning.load_plan import TensorPlan
from distquant.planning.planned import Planned
from distquant.sharding.device_map import is_offloaded, main_place, place_of

WHOLE = 1 << 40
"""Bytes of a device by which the part that a method leaves free is measured."""


def estimate(
    planned: Planned,
    dtype: str,
    decoder: Decoder | None,
    environment: Environment,
    max_memory: Any,
    context: int | None,
    batch: int,
) -> Estimates:
    """Returns the estimates of a planned load.

    Args:
        planned: the load.
        dtype: torch's name of the dtype that it is loaded in, which is also that of the cache.
        decoder: sizes of the model; None if its cache is not known.
        environment: the devices, as far as they are known.
        max_memory: as the user gave it.
        context: tokens to plan for; None = the usual.
        batch: sequences of each replica.
    """
    item = DTYPE_BYTES[dtype]
    longest = decoder.longest if decoder else None
    usual = min(longest or USUAL_CONTEXT, USUAL_CONTEXT)
    if planned.device_map is None:
        devices = _ranks(planned, item, decoder, environment.memory)
    else:
        limits = memory_limits(max_memory, planned.device_map)
        devices = tuple(_devices(planned, item, decoder, planned.device_map, limits))
    source = environment.memory_source if planned.device_map is None else "max_memory"
    return Estimates(
        devices=devices,
        load_buffer=planned.load_buffer,
        load_workspace=planned.load_workspace,
        limit_source=source,
        reserve=planned.scheme.adjust_max_memory(WHOLE) / WHOLE if planned.device_map is None else 1.0,
        decoded=decoder is not None,
        hidden_size=decoder.hidden_size if decoder else 0,
        vocab_size=decoder.vocab_size if decoder else 0,
        item_bytes=item,
        longest=longest,
        context=context or usual,
        batch=batch,
        uncounted=decoder.unknown if decoder else (),
    )


# -- ranks -------------------------------------------------------------------------------------------------------------


def _ranks(planned: Planned, item: int, decoder: Decoder | None, limit: int | None) -> tuple[Device, ...]:
    """Returns the ranks, those that take the same as one."""
    load_limit = None if limit is None else planned.scheme.adjust_max_memory(limit)
    kinds, found = planned.kinds(), dict[tuple[int, int], Device]()
    alike: dict[Device, list[int]] = {}
    for row in planned.memory:
        coordinates = planned.mesh.coordinates(row.rank)
        tp, ep = coordinates["tp"], coordinates["ep"]
        if (tp, ep) not in found:
            layers = decoder.layers if decoder else ()
            widest, dequantized = _widest(planned, item, kinds, decoder, tp)
            found[tp, ep] = Device(
                name="",
                ranks=(),
                weights=row.finished,
                cache=_cache_groups(planned, item, layers, tp),
                widest=widest,
                dequantized=dequantized,
                limit=limit,
                load_limit=load_limit,
            )
        alike.setdefault(found[tp, ep], []).append(row.rank)
    return tuple(replace(holder, name=f"rank {ranks[0]}", ranks=tuple(ranks)) for holder, ranks in alike.items())


def _cache_groups(planned: Planned, item: int, layers: tuple[CacheLayer, ...], tp: int) -> tuple[CacheGroup, ...]:
    """Returns the caches of some layers at a position on tp, with the kv heads that this position holds."""
    groups = Counter[CacheGroup]()
    for layer in layers:
        shard = planned.parallel.attentions.get(layer.module)
        heads = layer.heads if shard is None else planned.parallel.heads[shard.heads].kv.length(tp)
        token = (heads * layer.head_width + layer.shared_width) * item
        groups[CacheGroup(1, token, layer.window, layer.state * item + layer.float_state * FLOAT32)] += 1
    return tuple(replace(group, layers=count) for group, count in groups.items())


def _widest(
    planned: Planned, item: int, kinds: list[tuple[TensorPlan, int]], decoder: Decoder | None, tp: int
) -> tuple[int, int]:
    """Returns the outputs of the widest layer at a position on tp, and the bytes of its largest quantized weight."""
    description, widest, dequantized = planned.description, 0, 0
    ends = {*description.embeddings, description.input_embedding, description.output_embedding}
    for tensor, _ in kinds:
        one = first_expert(tensor)
        if not tensor.name.endswith(".weight") or len(one.shape) != 2 or tensor.name.rpartition(".")[0] in ends:
            continue
        outputs = one.shape[0]
        if one.partition and one.shard_dim == 0:
            outputs = planned.parallel.partitions[one.partition].length(tp)
        chosen = decoder.experts_per_token if decoder and tensor.experts is not None else 1
        widest = max(widest, outputs * chosen)
        if tensor.scheme != "none" and not planned.dequantize:
            dequantized = max(dequantized, planned.local_size(one, tp)[0] * item)
    return widest, dequantized


# -- a device map ------------------------------------------------------------------------------------------------------


def _devices(
    planned: Planned, item: int, decoder: Decoder | None, device_map: Mapping[str, str], limits: Mapping[str, int]
) -> Iterator[Device]:
    """Yields the devices of a device map. What is offloaded runs, and has its cache, on the main device."""
    weights = dict.fromkeys(device_map.values(), 0)
    for tensor in planned.tensors:
        place = place_of(device_map, tensor.name)
        if place is not None:
            weights[place] += planned.local_size(tensor, 0)[1]
    layers: dict[str, list[CacheLayer]] = {}
    for layer in decoder.layers if decoder else ():
        place = place_of(device_map, layer.module)
        if place is not None:
            place = main_place(device_map) if is_offloaded(device_map, place) else place
            layers.setdefault(place, []).append(layer)
    widest, dequantized = _widest(planned, item, planned.kinds(), decoder, 0)
    for device, nbytes in weights.items():
        runs = device in layers
        yield Device(
            name=device,
            ranks=(),
            weights=nbytes,
            cache=_cache_groups(planned, item, tuple(layers.get(device, ())), 0),
            widest=widest if runs else 0,
            dequantized=dequantized if runs else 0,
            limit=limits.get(device),
            load_limit=limits.get(device),
        )
