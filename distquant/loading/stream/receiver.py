"""The listening thread's part of a load: copies pieces of other ranks into their final memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch

from distquant.loading.stream.arrivals import ArrivalTracker
from distquant.loading.stream.messages import Message, Peer
from distquant.loading.stream.sinks import Sinks
from distquant.loading.stream.stage_timer import StageTimer
from distquant.loading.stream.staging_buffer import Slots
from distquant.loading.stream.tasks import Task
from distquant.planning.slots import READ_SLOTS


@dataclass
class TrafficStats:
    """Bytes sent to other ranks and received from them."""

    sent: int = 0
    received: int = 0


@dataclass(kw_only=True)
class Receiver:
    """Handles messages of peers, as a `MessageHandler`.

    Attributes:
        tasks: of the node.
        reads, sends: slots to read into, and slots to send from. Peers may copy from both.
        arrivals: counts rows that are in their place.
        sinks: final memory.
        timer: of the stages.
        streams: the main thread's current streams, set before the thread begins.
    """

    tasks: Sequence[Task]
    reads: Slots
    sends: Slots
    arrivals: ArrivalTracker
    sinks: Sinks
    timer: StageTimer
    streams: list[torch.Stream] = field(default_factory=list)
    traffic: TrafficStats = field(default_factory=TrafficStats)

    def begin(self) -> None:
        """Takes over the main thread's streams: memory that one thread makes, the other may fill or use at once."""
        for stream in self.streams:
            torch.accelerator.set_stream(stream)

    def copy(self, peer: Peer, message: Message) -> int:
        """Copies what this rank keeps out of another's memory."""
        task = self.tasks[message.tensor]
        sink = self.sinks.of(task)
        start = perf_counter()
        # Both sides derive where components lie from rows and mask, so the message need not list them.
        payload, _ = task.payload(message.start, message.stop, message.mask)
        received = 0
        for row_layout, begin, nbytes in payload:
            first = message.offset + begin
            values = peer.memory[first : first + nbytes].view(row_layout.dtype)
            received += sink.place(row_layout, values, message.start, message.stop)
        self.traffic.received += received
        self.timer.add("exchange", start, task.name, received)
        return received

    def arrived(self, message: Message) -> None:
        """Counts the rows of a piece."""
        self.arrivals.count(self.tasks[message.tensor], message.start, message.stop)

    def freed(self, message: Message) -> None:
        """Releases a slot that a peer has copied from."""
        self.traffic.sent += message.offset
        (self.reads if message.slot < READ_SLOTS else self.sends).release(message.slot, message.stop)
