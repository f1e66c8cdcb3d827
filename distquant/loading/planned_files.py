"""Opens a checkpoint on every rank, and compares it with the one that was planned."""

from __future__ import annotations

import dataclasses

from distquant.checkpoint import Checkpoint, open_checkpoint
from distquant.errors import InputError, Problem, RankError
from distquant.loading.stream.files import Files, ReadError
from distquant.parallel.comm import Comm
from distquant.planning.load_plan import LoadPlan
from distquant.planning.prepared import Prepared


def open_planned(plan: LoadPlan, comm: Comm, prepared: Prepared | None) -> Checkpoint:
    """Opens the checkpoint on this rank. Every rank must call it; all fail together.

    Args:
        plan: must be the same on every rank, but for the path of the folder.
        comm: the ranks.
        prepared: the checkpoint, if it is open already.

    Raises:
        InputError: plans differ, or files of any rank differ from those that were planned.
    """
    own_plan = dataclasses.replace(plan, model="").digest
    for rank, digest in enumerate(comm.collect(own_plan)):
        if digest != own_plan:
            fault = f"rank {rank} has the plan {digest[:16]}, rank {comm.rank} has {own_plan[:16]}"
            raise InputError.one("plan", fault, "Give every rank the same arguments, or the same plan")
    problems: list[Problem] = []
    checkpoint = None
    try:
        checkpoint = prepared.checkpoint if prepared is not None else open_checkpoint(plan.model, incomplete=True)
        problems += _differences(plan, checkpoint, comm.rank)
    except InputError as error:
        problems += [Problem(f"rank {comm.rank}: {p.where}", p.what, p.fix) for p in error.problems]
    # A rank that failed alone would leave the others waiting in their next collective.
    all_problems = [problem for each in comm.collect(problems) for problem in each]
    if all_problems:
        raise InputError(all_problems)
    assert checkpoint is not None
    return checkpoint


def check_unchanged(files: Files, comm: Comm) -> None:
    """Checks that files held still while they were read. Every rank must call it; all fail together.

    Raises:
        ReadError: this rank has read a file whose bytes may be others than when its header was read.
        RankError: another rank has.
    """
    change: ReadError | None = None
    try:
        files.check_unchanged()
    except ReadError as error:
        change = error
    changes = comm.collect(None if change is None else str(change))
    first = next((rank for rank, text in enumerate(changes) if text is not None), None)
    if first == comm.rank and change is not None:
        raise change
    if first is not None:
        raise RankError(first, f"rank {first}: {changes[first]}")


def check_paths(checkpoint: Checkpoint) -> None:
    """Raises ReadError if files that another library opens are no longer those whose headers were read."""
    files = Files(checkpoint.folder, "buffered", checkpoint.stamps())
    try:
        for shard in checkpoint.shards:
            files.open(shard.name)
    finally:
        files.close()


def _differences(plan: LoadPlan, checkpoint: Checkpoint, rank: int) -> list[Problem]:
    """Returns a problem for each file whose header or size is not the planned one."""
    own = checkpoint.digests()
    fault = f"on rank {rank} it differs from the planned file (header or size)"
    fix = "Give every rank the same files, then plan again"
    files = sorted(plan.shards.keys() | own.keys())
    differing = [file for file in files if plan.shards.get(file) != tuple(own.get(file, ()))]
    return [Problem(f"{plan.model}/{file}", fault, fix) for file in differing]
