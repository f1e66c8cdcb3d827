"""Maps what is kept as it is stored: the pages of a file are the memory of a tensor, and nothing is read or copied.

A tensor is mapped if every rank of the node that keeps some of it keeps one run of bytes of one file, in the dtype of
the file. All others are read. The mapping is private: whoever writes to a weight gets a copy of the pages that are
written to, and the file stays as it is. Pages that nobody has written to are the page cache's own, so all processes of
a machine share them, and the system may drop them and read them again.

Hence the file must stay, too. Whatever changes its bytes changes weights, and where it was shortened or cannot be read,
the system ends the process that touches such a page (SIGBUS).
"""

from __future__ import annotations

import mmap
import os
import types
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distquant.errors import InputError, Problems, RankError
from distquant.loading.shard_buffer import Allocator
from distquant.loading.stream.file_systems import is_local
from distquant.loading.stream.files import Files, ReadError
from distquant.loading.stream.tasks import TORCH_DTYPE, Task
from distquant.parallel.comm import Comm
from distquant.planning.row_map import RowRange, column_segments, row_segments, rows_and_width

NO_RESERVE = 0x4000 if hasattr(mmap, "MAP_POPULATE") else 0
"""Linux' MAP_NORESERVE, which `mmap` does not name. Pages that nobody writes to take no memory, so none is promised:
otherwise a file larger than the machine's memory could not be mapped."""

COMPONENT_ALIGNMENT = 64
"""Bytes at a multiple of which torch's own memory begins on a CPU, and a stored component must. Kernels of torch for
ordinary weights load elements from any multiple of their size, as they must for a view. Those for quantized ones may
not: `_weight_int8pack_mm`, which quanto calls, ends the process by SIGSEGV."""


class MappedTensors:
    """The tensors of a node that are mapped, and the part of each that this rank keeps.

    Attributes:
        nbytes: bytes of the files that this rank has mapped as weights.
        identities: (device, inode) of each of these files.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self.identities: set[tuple[int, int]] = set()
        self._runs: dict[int, tuple[mmap.mmap, RowRange]] = {}

    @classmethod
    def of(
        cls, tasks: Sequence[Task], files: Files, io: str, comm: Comm, node: Sequence[int], positions: Sequence[int]
    ) -> MappedTensors:
        """Chooses the tensors that are mapped, and takes their reads away. Every rank must call it; all fail together.

        Args:
            tasks: of this rank's node. What runs from rank to rank is decided alike by all ranks of the node.
            files: of the checkpoint.
            io: `mapped` maps all files; `auto` those that lie on a local file system, and in memory already; any other
                mode none.
            comm: the ranks.
            node: ranks of the node.
            positions: each rank's, on tp.

        Raises:
            InputError: a file cannot be mapped, and `io` asks for it.
            ReadError: a file is not the one whose header was read.
        """
        mapped = cls()
        if io not in ("auto", "mapped"):
            return mapped
        runs = {task.index: _runs(task, node, positions) for task in tasks if _stays(task)}
        names = sorted({run.file for each in runs.values() if each is not None for run in each.values()})
        maps = _agreed(files, names, io, comm, node)
        for task in tasks:
            kept = runs.get(task.index)
            if kept is None or any(run.file not in maps for run in kept.values()):
                continue
            # Nobody reads it, and nobody waits for its rows: it is finished in its turn.
            task.reads = ()
            if (own := kept.get(comm.rank)) is not None:
                mapped._runs[task.index] = (maps[own.file], own)
        for name in {run.file for _, run in mapped._runs.values()}:
            mapped.identities.add(_identity(os.fstat(files.open(name))))
        return mapped

    def allocator(self, task: Task) -> Allocator | None:
        """Returns what gives the final memory of a mapped tensor; None for one that is read."""
        if task.index not in self._runs:
            return None
        return partial(self._tensor, *self._runs.pop(task.index))

    def _tensor(self, mapped: mmap.mmap, run: RowRange, name: str, count: int, dtype: torch.dtype) -> Tensor:
        """Returns a run of a file as a tensor with a storage of its own, which keeps the mapping alive."""
        assert count * dtype.itemsize == run.nbytes, "a run has the elements of the rows that are kept"
        missing = run.offset + run.nbytes - len(mapped)
        if missing > 0:
            where = f"{run.file} at byte {run.offset} ({run.tensor})"
            raise ReadError(f"{where}: the file ends {missing} bytes too early")
        self.nbytes += run.nbytes
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=run.offset)

    def protect_files(self, model: Any) -> None:
        """Makes `save_pretrained` refuse to overwrite files whose pages are the model's own weights."""
        own, identities = model.__dict__.get("save_pretrained"), frozenset(self.identities)
        if not identities or (own is not None and not isinstance(own, types.MethodType)):
            return  # an object in its place refuses to save at all
        save = type(model).save_pretrained if own is None else own.__func__

        def save_pretrained(self: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
            for path in _files_in(save_directory):
                if _identity(os.stat(path)) in identities:
                    fault = f"the pages of {path} are the memory of this model's weights, and would be overwritten"
                    raise InputError.one("save_pretrained", fault, "Save to another folder, or load with io='buffered'")
            save(self, save_directory, *args, **kwargs)

        model.save_pretrained = types.MethodType(save_pretrained, model)


def _files_in(folder: str | os.PathLike[str]) -> list[str]:
    """Returns the paths of all files in a folder, links to files included; none if there is no such folder."""
    try:
        return [entry.path for entry in os.scandir(folder) if entry.is_file()]
    except OSError:  # `save_pretrained` says what is wrong with it, if anything is
        return []


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _stays(task: Task) -> bool:
    """Returns True if a tensor is kept as it is stored, on the CPU, in memory of its own."""
    # Experts have their place in the memory of a stack.
    alone = task.transfer.stack.experts is None and not task.transposed
    return alone and task.encode is None and task.device.type == "cpu" and len(task.row_layouts) == 1


def _runs(task: Task, node: Iterable[int], positions: Sequence[int]) -> Mapping[int, RowRange] | None:
    """Returns the run of bytes that each rank of a node keeps of a tensor; None if one of them keeps no such run."""
    kept: dict[int, RowRange] = {}
    by_position: dict[int, RowRange | None] = {}
    for rank in filter(task.is_for, node):
        tp = positions[rank]
        if tp not in by_position:
            by_position[tp] = _run(task, tp)
        run = by_position[tp]
        if run is None:
            return None
        kept[rank] = run
    return kept


def _run(task: Task, tp: int) -> RowRange | None:
    """Returns the bytes that a position on tp keeps, if they are one run of a file that begins where it must.

    Headers of files have any length, so tensors may begin anywhere.
    """
    kind, layout = task.transfer.kind, task.row_layouts[0]
    rows = row_segments(kind.shape, kind.shard_dim, kind.partition, tp)
    columns = column_segments(kind.shape, kind.shard_dim, kind.partition, tp)
    width = rows_and_width(kind.shape)[1]
    if layout.replicated or len(rows) != 1 or columns != ((0, width),):
        return None
    ranges = task.rows.ranges(rows[0], (0, width))
    if not ranges or any(TORCH_DTYPE[each.dtype] != task.dtype for each in ranges):
        return None
    first, end = ranges[0], ranges[0].offset
    for each in ranges:
        if each.file != first.file or each.offset != end:
            return None
        end += each.nbytes
    nbytes = end - first.offset
    alignment = task.dtype.itemsize if kind.component is None else COMPONENT_ALIGNMENT
    if not nbytes or first.offset % alignment or nbytes % task.dtype.itemsize:
        return None
    # The whole run as one row: whoever maps it needs its bytes only.
    return RowRange(first.tensor, first.file, first.offset, nbytes, nbytes, 1, first.dtype)


def _agreed(files: Files, names: Sequence[str], io: str, comm: Comm, node: Sequence[int]) -> dict[str, mmap.mmap]:
    """Returns the mapped files, where all ranks of the node have mapped them."""
    maps: dict[str, mmap.mmap] = {}
    problems, failure = Problems(), None
    for name in names:
        try:
            if (made := _map(files, name, io)) is not None:
                maps[name] = made
        except InputError as error:
            problems.extend(error.problems)
        except ReadError as error:
            failure = error
            break
    # A rank that failed alone would leave the others waiting in their next collective.
    answers = comm.collect((tuple(maps), tuple(problems), None if failure is None else str(failure)))
    if failure is not None:
        raise failure
    for rank, (_, theirs, fault) in enumerate(answers):
        if fault is not None:
            raise RankError(rank, fault)
        problems.extend(theirs)  # the same file on the same disk is one problem, however many ranks have it
    problems.raise_if_any()
    everywhere = set(maps).intersection(*(answers[rank][0] for rank in node))
    return {name: made for name, made in maps.items() if name in everywhere}


def _map(files: Files, name: str, io: str) -> mmap.mmap | None:
    """Maps a file privately; returns None where `auto` reads it."""
    fd = files.open(name)
    if io == "auto" and not (is_local(fd) and files.in_memory(name)):
        return None
    try:
        return mmap.mmap(fd, 0, mmap.MAP_PRIVATE | NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        if io == "auto":
            return None
        fault = f"{files.folder / name} cannot be mapped ({error.strerror})"
        raise InputError.one("io", fault, "Use io='auto' or 'buffered'") from error
