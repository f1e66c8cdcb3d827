"""The rows of a transfer as a node reads and sends them. Planner and loader size the load buffer by these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from distquant.checkpoint import TensorInfo
from distquant.dtypes import TORCH_NAMES
from distquant.planning.read_assignment import NodeReads
from distquant.planning.row_map import RowMap, rows_and_width
from distquant.planning.slots import STATISTICS, smallest_piece, statistics_bytes
from distquant.planning.transfers import Transfer, TransferKind
from distquant.sharding.partition import Segment
from distquant.sharding.row_layout import RowLayout, row_layout_of


@dataclass(frozen=True, slots=True)
class NodeRows:
    """The rows of a transfer on one node.

    Attributes:
        rows: where they are stored; the rows of a transposed tensor are its logical columns.
        columns: columns of the stored rows that the node reads.
        row_layouts: components in which rows are sent; a single one named "" for a tensor that stays as it is.
        dtype: the `torch.dtype` that rows are cast to.
    """

    rows: RowMap
    columns: Segment
    row_layouts: tuple[RowLayout, ...]
    dtype: Any

    @property
    def row_bytes(self) -> int:
        """Bytes that are read of a row."""
        return self.rows.row_bytes() // max(self.rows.width, 1) * (self.columns[1] - self.columns[0])


Layouts = dict[tuple[TransferKind, Segment, Any], tuple[RowLayout, ...]]
"""Row layouts by kind, the node's columns, and dtype."""


def node_rows(
    transfer: Transfer, columns: Segment, infos: Mapping[str, TensorInfo], layouts: Layouts | None = None
) -> NodeRows:
    """Returns the rows of a transfer on a node.

    Args:
        transfer: the transfer.
        columns: logical columns that the node reads of every row.
        infos: headers of the checkpoint.
        layouts: row layouts that are known already; gets those of this transfer's kind.
    """
    import torch

    kind, first = transfer.kind, infos[transfer.sources[0].tensor]
    shape = first.shape if kind.decoded else kind.shape
    rows = RowMap(shape[::-1] if transfer.transposed else shape, transfer.sources, infos)
    dtype = getattr(torch, kind.dtype or TORCH_NAMES[first.dtype])
    # Rows of another form are read with all their columns: the node's columns count logical ones.
    stored = (0, rows.width) if transfer.transposed or kind.decoded else columns
    layouts, key = {} if layouts is None else layouts, (kind, columns, dtype)
    if key not in layouts:
        layouts[key] = _row_layouts(kind, columns, dtype)
    return NodeRows(rows, stored, layouts[key], dtype)


def _row_layouts(kind: TransferKind, columns: Segment, dtype: Any) -> tuple[RowLayout, ...]:
    """Returns the components of a transfer in the columns that the node reads."""
    shape = (rows_and_width(kind.shape)[0], columns[1] - columns[0])
    if kind.component is not None:
        # Sharded or not, every owner gets its rows of a stored component: none is marked as replicated beside them.
        return tuple(replace(row_layout_of(component, shape), dtype=dtype) for component in kind.components)
    return tuple(row_layout_of(component, shape, component.name in kind.replicated) for component in kind.components)


class PieceSizes:
    """The sizes that decide how large the load buffer is, over all nodes.

    Args:
        infos: headers of the checkpoint.

    Attributes:
        smallest: bytes of the largest piece that cannot be divided.
    """

    def __init__(self, infos: Mapping[str, TensorInfo]):
        self.smallest = 1
        self._infos = infos
        self._known: dict[tuple[TransferKind, Segment], tuple[int, int]] = {}
        self._statistics: list[tuple[int, int]] = []
        """Of each node: bytes of the statistics of all its tensors, and of the tensor that has most."""

    def add_node(self, reads: Iterable[NodeReads]) -> None:
        """Adds what a node reads."""
        counts = Counter[tuple[TransferKind, Segment]]()
        for transfer, _, columns, _ in reads:
            key = (transfer.kind, columns)
            counts[key] += 1
            if key not in self._known:
                found = node_rows(transfer, columns, self._infos)
                piece = smallest_piece(found.row_bytes, transfer.kind.row_step, found.row_layouts)
                self._known[key] = (piece, statistics_bytes(found.row_layouts))
        self.smallest = max([self.smallest, *(self._known[key][0] for key in counts)])
        total = sum(self._known[key][1] * count for key, count in counts.items())
        self._statistics.append((total, max((self._known[key][1] for key in counts), default=0)))

    def statistics(self, staging: int) -> int:
        """Returns the bytes that statistics of unfinished tensors may take on a rank, of a budget of `staging`."""
        return max((max(min(total, staging // STATISTICS), most) for total, most in self._statistics), default=0)
