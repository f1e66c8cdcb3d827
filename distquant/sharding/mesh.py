"""The device mesh, written `tp=2` or `dp=2,tp=4`. Axes are ordered dp, ep, tp; the last varies fastest over ranks."""

from __future__ import annotations

import difflib
import re
import reprlib
from dataclasses import dataclass

from distquant.errors import InputError, Problem

AXES = ("dp", "ep", "tp")

REPLICA = "ep,tp"
"""Both axes together: the ranks that share one replica of the model."""


DIGITS = 30
"""Digits of a size that are read. More cannot matter, and Python converts no more than 4,300 into a number."""

MOST_RANKS = 16_384
"""Ranks that a plan is made for. Its time and size grow with them; this is far past any cluster that is one job's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Sizes of the mesh axes; rank = (dp * ep_size + ep) * tp_size + tp."""

    dp: int = 1
    """Replicas of the whole model."""
    ep: int = 1
    """Ranks over which experts are distributed."""
    tp: int = 1
    """Ranks over which every layer is partitioned."""

    def __post_init__(self) -> None:
        """Raises `InputError` where a size is not an integer of at least 1, or where all of them are too many ranks."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        for axis, size in sizes.items():
            if type(size) is not int or size < 1:
                problem = f"{axis}={reprlib.repr(size)} is not axis=size of at least 1"
                raise InputError.one("mesh", problem, "Give integers from 1")
        if self.size > MOST_RANKS:
            named = ",".join(f"{axis}={_short(size)}" for axis, size in sizes.items() if size > 1)
            problem = f"{named} is {_short(self.size)} ranks, and at most {MOST_RANKS} can be planned for"
            raise InputError.one("mesh", problem, "Give the sizes of the cluster that you have")

    @property
    def size(self) -> int:
        """Ranks of all axes."""
        return self.dp * self.ep * self.tp

    def coordinates(self, rank: int) -> dict[str, int]:
        """Returns the position of a rank on every axis."""
        rest, tp = divmod(rank, self.tp)
        dp, ep = divmod(rest, self.ep)
        return {"dp": dp, "ep": ep, "tp": tp}

    def peers(self, rank: int, axis: str) -> tuple[int, ...]:
        """Returns the ranks that differ from `rank` on `axis` (or `REPLICA`) only, itself included, in order."""
        mine = self.coordinates(rank)
        others = [name for name in AXES if name not in axis.split(",")]
        every = ((r, self.coordinates(r)) for r in range(self.size))
        return tuple(r for r, position in every if all(position[name] == mine[name] for name in others))

    def __str__(self) -> str:
        named = [f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        return ",".join(named) or "tp=1"

    @classmethod
    def parse(cls, text: str | int | Mesh | None) -> Mesh:
        """Reads `dp=2,tp=4`; None is one rank, and a number alone means tp. Raises `InputError` for anything else."""
        if text is None:
            return cls()
        if isinstance(text, cls):
            return text
        if is_number(text):
            text = f"tp={str(text).strip()}"
        sizes: dict[str, int] = {}
        for part in str(text).split(","):
            match = re.fullmatch(r"\s*([a-z]+)\s*=\s*0*(\d+)\s*", part)
            axis = match.group(1) if match else ""
            if not match or axis not in AXES or not int(match.group(2)[:DIGITS]) or axis in sizes:
                near = difflib.get_close_matches(axis, AXES, 1)
                hint = f" (did you mean {near[0]!r}?)" if near and near[0] != axis else ""
                raise InputError.one(
                    "mesh",
                    f"{part.strip()!r} in {str(text)!r} is not axis=size of at least 1, named once{hint}",
                    f"Write it as 'tp=2' or 'dp=2,tp=4'; axes are {', '.join(AXES)}",
                )
            sizes[axis] = int(match.group(2)[:DIGITS])  # more digits are too many ranks all the same
        return cls(**sizes)


def is_number(mesh: object) -> bool:
    """Returns True for a mesh that is given as a number of ranks alone: `2` or `"2"`."""
    return type(mesh) is int or (isinstance(mesh, str) and re.fullmatch(r"\s*\d+\s*", mesh) is not None)


def _short(size: int) -> str:
    """Writes a size in bounded length: the user may have written any number of digits."""
    return str(size) if size < 10**DIGITS else f"more than 10^{DIGITS - 1}"


def world_problem(mesh: Mesh, world: int) -> Problem | None:
    """Returns what is wrong if the mesh needs another number of ranks than a launcher has started."""
    if mesh.size == world:
        return None
    if mesh.size == 1:
        fix = f"Give mesh tp={world} to divide the model over them, or mesh dp={world} for a whole one on each"
        return Problem("mesh", f"{mesh}, which is the default, needs one rank, the launcher started {world}", fix)
    fault = f"{mesh} needs {mesh.size} ranks, the launcher started {world}"
    return Problem("mesh", fault, f"Start {mesh.size} ranks, or give a mesh of {world}")
