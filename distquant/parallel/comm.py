"""Communication between ranks, whatever runs them: the protocol, and its form for a single process.

Process groups are made in `runtime/` only. Everything else gets an `Axis` or a `Comm`, and does not know who made it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from distquant.errors import RankError


DEFAULT_TIMEOUT = 600.0
"""Seconds after which a rank that receives nothing from the others gives up."""

MISSED = 3.0
"""Seconds without a sign of life after which a rank is named as the cause of a wait that was too long."""


class Axis(Protocol):
    """The ranks along one mesh axis, seen from one of them."""

    rank: int
    """This rank's position on the axis."""
    size: int
    """Ranks on the axis."""

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Reduces in place over the axis (`sum` or `max`) and returns `tensor`."""

    def all_gather(self, tensor: Tensor, sizes: list[int], dim: int) -> Tensor:
        """Concatenates every rank's tensor along `dim`; `sizes` are their lengths there, and may differ."""

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Fills `tensor` on every rank with that of axis position `source`."""

    def all_to_all(self, tensor: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Sends runs of `sent` rows of `tensor` to the ranks in order; returns runs of `received` rows from them."""


class Comm(Protocol):
    """All ranks of a load, seen from one of them."""

    rank: int
    world_size: int
    timeout: float
    """Seconds that a rank waits for the others before it gives up."""

    def axis(self, name: str) -> Axis:
        """Returns the ranks along a mesh axis (`dp`, `ep`, `tp`), or `ep,tp`: all that hold a part of one replica."""

    def share(self, value: Any) -> Any:
        """Returns rank 0's (picklable) value, on every rank."""

    def collect(self, value: Any) -> list[Any]:
        """Returns every rank's (picklable) value, in rank order, on every rank."""

    def silent(self, seconds: float | None = None) -> RankError | None:
        """Returns the error that names a rank without a sign of life for so long (None: the timeout), if one is."""


class SoloAxis:
    """An axis with one rank on it."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor, sizes: list[int], dim: int) -> Tensor:
        return tensor

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        return tensor

    def all_to_all(self, tensor: Tensor, sent: list[int], received: list[int]) -> Tensor:
        return tensor


class SoloComm:
    """One process: every collective is the identity."""

    rank = 0
    world_size = 1
    timeout = DEFAULT_TIMEOUT

    def axis(self, name: str) -> SoloAxis:
        return SoloAxis()

    def share(self, value: Any) -> Any:
        return value

    def collect(self, value: Any) -> list[Any]:
        return [value]

    def silent(self, seconds: float | None = None) -> RankError | None:
        return None
