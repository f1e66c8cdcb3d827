"""The contestants of `load.py`, their figures, and the bars that they must meet. `systems.py` has the work of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Contestant:
    """One row of the table.

    Attributes:
        name: text that `--only` searches.
        system: a key of `SYSTEMS`.
        quant: distquant's short name of the quantization; "none" is unquantized bf16, "" the checkpoint's own.
        ranks, threads: processes, and threads of each.
        mesh: distquant's mesh; "" is tp over all ranks.
        staging, io: distquant's options; "" is their default.
        cold: True if the files are dropped from the page cache before a run, not read into it.
        once: True if one run is enough, because it measures bytes and not seconds.
        peer: a key of `peers.PEERS`, for the system "upstream".
        small: folder of the model that is loaded before the clock starts; "" is the small example model.
    """

    name: str
    system: str
    quant: str = ""
    ranks: int = 1
    threads: int = 1
    mesh: str = ""
    staging: str = ""
    io: str = ""
    cold: bool = False
    once: bool = False
    peer: str = ""
    small: str = ""


@dataclass(frozen=True)
class Measured:
    """One rank's figures; None if a system does not measure one.

    Attributes:
        seconds: seconds from the common start to the end.
        memory: peak of resident bytes, over those before the start.
        own: bytes at the end outside mapped files, over those before the start.
        read: bytes read from files; `direct` of them past the page cache.
        needed: bytes of the checkpoint's tensors that fill the model, each counted once.
        finished: bytes of the finished shard.
        quantized, planned: bytes of its quantized weights, measured and planned.
        held: bytes of all tensors of the model.
        staging: bytes of the staging budget.
        parts: seconds of the parts of a floor.
        reads: bytes of a mixture of experts that were read, by their kind (`reads.KINDS`).
    """

    seconds: float = 0.0
    memory: int = 0
    own: int | None = None
    read: int | None = None
    direct: int | None = None
    needed: int | None = None
    finished: int | None = None
    quantized: int | None = None
    planned: int | None = None
    held: int | None = None
    staging: int | None = None
    parts: dict[str, float] = field(default_factory=dict)
    reads: dict[str, int] = field(default_factory=dict)


BNB_NF4, BNB_INT8 = "transformers + bitsandbytes nf4-dq", "transformers + bitsandbytes int8"
HF_TP = "transformers bf16 tp=2"
COLD, PLAIN = "distquant nf4-dq tp=2 cold", "plain O_DIRECT read, 2 threads"
CONTESTANTS = (
    Contestant("distquant nf4-dq tp=2", "distquant", "nf4-dq", 2),
    Contestant("distquant nf4-dq tp=1", "distquant", "nf4-dq", 1, 2),
    Contestant(BNB_NF4, "transformers", "nf4-dq", 1, 2),
    Contestant("floor nf4-dq tp=2", "floor", "nf4-dq", 2),
    Contestant("distquant int8 tp=2", "distquant", "int8", 2),
    Contestant(BNB_INT8, "transformers", "int8", 1, 2),
    Contestant("floor int8 tp=2", "floor", "int8", 2),
    Contestant("distquant bf16 tp=2", "distquant", "none", 2),
    Contestant(HF_TP, "transformers", "none", 2),
    Contestant("floor bf16 tp=2", "floor", "none", 2),
    Contestant("distquant nf4-dq tp=2 staging=64MiB", "distquant", "nf4-dq", 2, staging="64MiB"),
    Contestant("distquant int8 tp=2 staging=64MiB", "distquant", "int8", 2, staging="64MiB"),
    Contestant("distquant bf16 tp=2 staging=64MiB", "distquant", "none", 2, staging="64MiB"),
    Contestant(COLD, "distquant", "nf4-dq", 2, cold=True),
    Contestant(PLAIN, "read", threads=2, cold=True),
    Contestant("distquant nf4-dq tp=4", "distquant", "nf4-dq", 4, once=True),
    Contestant("distquant nf4-dq dp=2,tp=2", "distquant", "nf4-dq", 4, mesh="dp=2,tp=2", once=True),
    Contestant("preadv of the bytes, 2 threads", "read", threads=2),
    Contestant("first write to as much fresh memory, 2 processes", "fresh", ranks=2),
)


@dataclass(frozen=True)
class Bar:
    """A bar for two contestants' times: A at least `faster` times as fast as B, or at most `most` times B's time."""

    a: str
    b: str
    faster: float | None = None
    most: float | None = None


BARS = (
    Bar("distquant nf4-dq tp=2", BNB_NF4, faster=20),
    Bar("distquant nf4-dq tp=2", "floor nf4-dq tp=2", most=1.6),
    Bar("distquant nf4-dq tp=1", BNB_NF4),
    Bar("distquant int8 tp=2", BNB_INT8, faster=8),
    Bar("distquant int8 tp=2", "floor int8 tp=2", most=1.6),
    Bar("distquant bf16 tp=2", HF_TP, faster=1.5),
    Bar("distquant bf16 tp=2", "floor bf16 tp=2", most=1.6),
    Bar(COLD, PLAIN, most=1.15),
)
MEMORY_BAR = 100 << 20
"""Bytes that a rank may have resident beyond its finished shard and the staging."""

Run = Callable[[], Measured]
