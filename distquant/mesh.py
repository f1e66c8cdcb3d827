"""The device mesh in words: `tp=2`, `dp=2,tp=4`. Axes are ordered dp, ep, tp; the last varies fastest over ranks."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from distquant.errors import InputError

AXES = ("dp", "ep", "tp")

REPLICA = "ep,tp"
"""Both axes together: the ranks that hold one replica of the model among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Sizes of the mesh axes; rank = (dp * ep_size + ep) * tp_size + tp."""

    dp: int = 1
    """Replicas of the whole model."""
    ep: int = 1
    """Ranks over which experts are dealt out."""
    tp: int = 1
    """Ranks over which every layer is cut."""

    @property
    def size(self) -> int:
        return self.dp * self.ep * self.tp

    def coordinates(self, rank: int) -> dict[str, int]:
        """Position of a rank on every axis."""
        rest, tp = divmod(rank, self.tp)
        dp, ep = divmod(rest, self.ep)
        return {"dp": dp, "ep": ep, "tp": tp}

    def peers(self, rank: int, axis: str) -> tuple[int, ...]:
        """Ranks that differ from `rank` on `axis` (or on both of `REPLICA`) only, itself included, in order."""
        mine = self.coordinates(rank)
        others = [name for name in AXES if name not in axis.split(",")]
        every = ((r, self.coordinates(r)) for r in range(self.size))
        return tuple(r for r, at in every if all(at[name] == mine[name] for name in others))

    def __str__(self) -> str:
        named = [f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        return ",".join(named) or "tp=1"

    @classmethod
    def parse(cls, text: str | Mesh | None) -> Mesh:
        """Reads `dp=2,tp=4`; None is one rank. Raises `InputError` for anything else."""
        if text is None:
            return cls()
        if isinstance(text, cls):
            return text
        sizes: dict[str, int] = {}
        for part in str(text).split(","):
            match = re.fullmatch(r"\s*([a-z]+)\s*=\s*(\d+)\s*", part)
            axis = match.group(1) if match else ""
            if not match or axis not in AXES or int(match.group(2)) < 1 or axis in sizes:
                near = difflib.get_close_matches(axis, AXES, 1)
                hint = f" (did you mean {near[0]!r}?)" if near and near[0] != axis else ""
                raise InputError.one(
                    "mesh",
                    f"{part.strip()!r} in {str(text)!r} is no axis=size of at least 1, named once{hint}",
                    f"Write it as 'tp=2' or 'dp=2,tp=4'; axes are {', '.join(AXES)}",
                )
            sizes[axis] = int(match.group(2))
        return cls(**sizes)
