"""The memory that a planned model takes on each device, while it loads and while it generates.

    loading      weights + load buffer + what tensors in progress take beside it
    generation   weights + cache + activations

The load buffer is gone when generation begins, so a device needs the larger of both. Weights, load buffer and cache are
exact. Activations are an estimate: the peak of a prompt as long as the context. It counts four copies of the hidden
states, three of the widest layer's outputs, and logits in float32. It adds one dequantized weight, and one layer's
cache, which is copied when it grows. The runtime's own memory (CUDA context, allocator) is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from distquant.errors import InputError

USUAL_CONTEXT = 4096
"""Tokens that are planned for where nobody names a context, if the model has as many."""

HIDDEN_COPIES, WIDE_COPIES, LOGITS_BYTES = 4, 3, 4
"""The terms of the estimate of activations."""


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers whose caches are alike, on one device.

    Attributes:
        layers: how many.
        token_bytes: bytes that a layer keeps of a token.
        window: tokens that it keeps at most, the newest included; None = all.
        state_bytes: bytes that it keeps of a sequence, whatever its length.
    """

    layers: int
    token_bytes: int
    window: int | None = None
    state_bytes: int = 0

    def layer_bytes(self, context: int, batch: int) -> int:
        """Returns the bytes of one layer's cache."""
        # transformers keeps a window less one, as the newest token comes with its own keys and values.
        tokens = context if self.window is None else min(context, self.window - 1)
        return batch * (self.token_bytes * tokens + self.state_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device of a device map, or all ranks that take the same.

    Attributes:
        name: the device, or the first of the ranks.
        ranks: that it stands for; empty for a device of a device map, where the load buffer is not on the device.
        weights: bytes of finished weights.
        cache: of the layers that it runs.
        widest: outputs of a token in its widest layer.
        dequantized: bytes of its largest quantized weight in the load dtype.
        limit: bytes that may be filled; None = unknown.
        load_limit: bytes that weights and load buffer may fill: some methods keep a part of the limit free.
    """

    name: str
    ranks: tuple[int, ...]
    weights: int
    cache: tuple[CacheGroup, ...]
    widest: int
    dequantized: int
    limit: int | None
    load_limit: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Bytes on one device, or on each of some ranks that take the same.

    Attributes:
        name: the device, or the first of the ranks.
        ranks: that take the same; empty for a device of a device map.
        weights: finished weights.
        load_buffer: that weights pass through while they are loaded.
        load_workspace: that tensors in progress take beside it.
        cache: keys and values, or other states, of all tokens.
        activations: of a prompt as long as the context, an estimate.
        limit: that may be filled; None = unknown.
        load_limit: that weights and load buffer may fill: some methods keep a part of the limit free.
    """

    name: str
    ranks: tuple[int, ...]
    weights: int
    load_buffer: int
    load_workspace: int
    cache: int
    activations: int
    limit: int | None
    load_limit: int | None

    @property
    def loading(self) -> int:
        """Bytes while it loads."""
        return self.weights + self.load_buffer + self.load_workspace

    @property
    def generating(self) -> int:
        """Bytes while it generates."""
        return self.weights + self.cache + self.activations

    @property
    def needed(self) -> int:
        """The larger of both."""
        return max(self.loading, self.generating)

    @property
    def loads(self) -> bool | None:
        """True if loading fits the limit; None without one."""
        return None if self.load_limit is None else self.loading <= self.load_limit

    @property
    def fits(self) -> bool | None:
        """True if loading and generation fit the limit; None without one."""
        return None if self.limit is None else bool(self.loads) and self.generating <= self.limit


@dataclass(frozen=True, slots=True)
class Alternative:
    """A change of the request that makes it fit: the option with its value, and the bytes that a device then needs."""

    change: str
    needed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimates:
    """All that the memory of a plan follows from; `LoadPlan.memory_for` does the sums.

    Attributes:
        devices: all of them, equal ranks as one.
        load_buffer: bytes of the load buffer of a rank.
        load_workspace: bytes that tensors in progress take beside it.
        limit_source: source of the limits: `max_memory`, or a measurement.
        reserve: part of a limit that weights and load buffer may fill.
        decoded: False if the model's cache is not known, so that generation is not estimated.
        hidden_size, vocab_size: of the model.
        item_bytes: bytes of an element of the cache and the activations.
        longest: tokens of the longest context that the model's configuration names.
        context, batch: tokens and sequences of a replica that the plan was asked about.
        uncounted: layers whose cache is not known, so that it is not counted.
        alternatives: changes that make it fit, where it does not; smallest first.
    """

    devices: tuple[Device, ...]
    load_buffer: int
    load_workspace: int
    limit_source: str
    reserve: float = 1.0
    decoded: bool = True
    hidden_size: int = 0
    vocab_size: int = 0
    item_bytes: int = 2
    longest: int | None = None
    context: int = USUAL_CONTEXT
    batch: int = 1
    uncounted: tuple[str, ...] = ()
    alternatives: tuple[Alternative, ...] = ()

    def memory(self, context: int | None = None, batch: int | None = None) -> tuple[DeviceMemory, ...]:
        """Returns the memory of every device, by default for the context and batch that the plan was asked about.

        Raises:
            InputError: fewer than one token or sequence.
        """
        context = self.context if context is None else context
        batch = self.batch if batch is None else batch
        for name, value in (("context", context), ("batch", batch)):
            if value < 1:
                raise InputError.one(name, f"invalid number {value}", "Give 1 or more")
        return tuple(self._memory(device, context, batch) for device in self.devices)

    def worst(self, context: int | None = None, batch: int | None = None) -> DeviceMemory:
        """Returns the device that is farthest beyond its limit, or nearest to it."""
        return max(self.memory(context, batch), key=lambda device: device.needed - (device.limit or 0))

    def longest_context(self, batch: int) -> int | None:
        """Returns the longest context, up to the asked one, that fits every device; None if not even one token does."""
        if not self.decoded or not self._fits(1, batch):
            return None
        least, most = 1, self.context
        while least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if self._fits(middle, batch) else (least, middle - 1)
        return least

    def _fits(self, context: int, batch: int) -> bool:
        return all(device.fits is not False for device in self.memory(context, batch))

    def _memory(self, device: Device, context: int, batch: int) -> DeviceMemory:
        cache = sum(group.layers * group.layer_bytes(context, batch) for group in device.cache)
        return DeviceMemory(
            name=device.name,
            ranks=device.ranks,
            weights=device.weights,
            load_buffer=self.load_buffer if device.ranks else 0,
            load_workspace=self.load_workspace if device.ranks else 0,
            cache=cache,
            activations=self._activations(device, context, batch),
            limit=device.limit,
            load_limit=device.load_limit,
        )

    def _activations(self, device: Device, context: int, batch: int) -> int:
        if not self.decoded or not device.widest:
            return 0
        token = (HIDDEN_COPIES * self.hidden_size + WIDE_COPIES * device.widest) * self.item_bytes
        logits = batch * self.vocab_size * (self.item_bytes + LOGITS_BYTES)
        copied = max((group.layer_bytes(context, batch) for group in device.cache), default=0)
        return batch * context * token + logits + device.dequantized + copied
