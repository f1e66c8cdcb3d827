"""The expected end of a world, computed from whole tensors without the loader's slicing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from plans import reduced
from torch import Tensor
from world import World

from distquant.planning.load_plan import TensorPlan
from distquant.planning.read_assignment import node_columns
from distquant.planning.row_map import row_segments, rows_and_width
from distquant.sharding.row_layout import column_step


def expected(world: World, tensor: TensorPlan, rank: int) -> dict[str, Tensor]:
    """Returns the components that a rank ends with, from the whole tensor."""
    whole = world.values[tensor.name]
    tp = world.mesh.coordinates(rank)["tp"]
    partition = world.partitions[tensor.partition] if tensor.partition else None
    segments = [(0, whole.shape[tensor.shard_dim or 0])] if partition is None else list(partition.segments(tp))
    if tensor.scheme == "none":
        return {"": _taken(whole, tensor.shard_dim or 0, segments).reshape(-1)}
    found = {}
    for component in world.scheme.components:
        if component.name in world.scheme.whole or partition is None:
            found[component.name] = reduced(whole, component).reshape(-1)
        elif tensor.shard_dim == 0:
            pieces = [reduced(whole[a:b], component).reshape(-1) for a, b in segments]
            found[component.name] = torch.cat(pieces, 0)
        else:
            found[component.name] = _columns(whole, component, segments).reshape(-1)
    return found


def needed(world: World, node: int) -> dict[str, np.ndarray]:
    """File -> how often each byte is read on a node: once, where one of its ranks keeps something of it."""
    ranks = [rank for rank, its in enumerate(world.nodes) if its == node]
    positions = [world.mesh.coordinates(rank)["tp"] for rank in ranks]
    found = {name: np.zeros(len(c), int) for name, c in world.counters[node].items()}
    for tensor in world.tensors:
        partition = world.partitions[tensor.partition] if tensor.partition else None
        rows, width = rows_and_width(tensor.shape)
        mask = np.zeros((rows, width), bool)
        apart = 1
        if tensor.scheme != "none":
            apart = None if tensor.transposed else column_step(world.scheme.components, (rows, width))
        columns = node_columns(tensor.shape, tensor.shard_dim, partition, positions, apart)
        for tp in positions:
            for start, stop in row_segments(tensor.shape, tensor.shard_dim, partition, tp):
                mask[start:stop, slice(*columns)] = True
        _mark(world, tensor, mask.T if tensor.transposed else mask, found)
    return found


def _mark(world: World, tensor: TensorPlan, mask: np.ndarray, found: dict[str, np.ndarray]) -> None:
    """Carries a mask over a tensor's elements to the bytes of its sources."""
    at, flat = 0, np.ascontiguousarray(mask).reshape(-1)
    for source in tensor.sources:
        info = world.infos[source.tensor]
        count = int(np.prod(info.shape))
        item, skip = info.nbytes // count, 0
        if source.take is not None:
            per = count // info.shape[0]
            skip, count = source.take[1] * per, (source.take[2] - source.take[1]) * per
        begin = info.offset + skip * item
        found[info.file][begin : begin + count * item] += np.repeat(flat[at : at + count], item)
        at += count


def _taken(whole: Tensor, dim: int, segments: list[tuple[int, int]]) -> Tensor:
    dim = len(whole.shape) - 1 if dim else 0
    return torch.cat([whole.narrow(dim, a, b - a) for a, b in segments], dim)


def _columns(whole: Tensor, component: Any, segments: list[tuple[int, int]]) -> Tensor:
    if not component.flat and component.block_shape[1] < 0:
        return reduced(whole, component)
    return torch.cat([reduced(whole[:, a:b].contiguous(), component) for a, b in segments], 1)
