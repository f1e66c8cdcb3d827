"""Made-up tensors, partitions and files, and a scheme whose components are maxima over tiles: exact to compare."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distquant.checkpoint import TensorInfo
from distquant.model.description import Source
from distquant.planning.load_plan import TensorPlan
from distquant.sharding.layout import ALL, Component
from distquant.sharding.partition import Partition, even_partition, join_partitions
from distquant.sharding.row_layout import row_step

STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8}


def reduced(rows: Tensor, component: Component) -> Tensor:
    """A component of `[n, columns]` by its declaration, `[n / span, columns / span]`, or flat where it straddles."""
    dtype, (count, width) = getattr(torch, component.dtype), rows.shape
    values = rows.float()
    if component.flat:
        flat = torch.nn.functional.pad(values.reshape(-1), (0, -values.numel() % component.flat))
        found = flat.view(-1, component.flat).amax(1).to(dtype)
        return found.view(count, -1) if width % component.flat == 0 else found
    down, across = component.block_shape
    across = width if across == ALL else across
    padded = torch.nn.functional.pad(values, (0, -width % across, 0, -count % down))
    return padded.view(-(-count // down), down, -(-width // across), across).amax((1, 3)).to(dtype)


@dataclass(frozen=True)
class Tiles:
    """A way to quantize: components, and the names of those that every rank needs whole."""

    components: tuple[Component, ...]
    whole: frozenset[str] = frozenset()

    def encode(self, rows: Tensor, out: dict[str, Tensor]) -> None:
        for component in self.components:
            out[component.name].copy_(reduced(rows, component).reshape(-1))


def random_scheme(chance: random.Random) -> Tiles:
    """Codes, and often a scale: by tiles, by rows or flat; local, or needed whole by every rank."""
    codes = chance.choice(
        [
            Component(name="", dtype="uint8", block_shape=(1, 1)),
            Component(name="", dtype="uint8", flat=2),
            Component(name="", dtype="int16", block_shape=(1, 4)),
        ]
    )
    scale = chance.choice(
        [
            None,
            Component(name="scale", dtype="float32", block_shape=(1, ALL)),
            Component(name="scale", dtype="float32", block_shape=(2, 8)),
            Component(name="scale", dtype="float32", flat=16),
        ]
    )
    components = (codes,) if scale is None else (codes, scale)
    return Tiles(components, frozenset(["scale"] if scale is not None and chance.random() < 0.5 else []))


def random_partition(chance: random.Random, size: int, alignment: int, ranks: int, dim: int) -> Partition | None:
    """Even, packed, or with rows (or columns) that several ranks hold, rows also one rank several times."""
    kind = chance.choice(["even", "even", "packed", "repeated"])
    if kind == "packed":
        first = size // 2 // alignment * alignment
        partitions = [
            partition
            for partition in (even_partition(first, alignment, ranks), even_partition(size - first, alignment, ranks))
            if partition
        ]
        return join_partitions(partitions) if len(partitions) == 2 else None
    if kind == "repeated" and size % alignment == 0:
        heads = size // alignment
        held = [chance.choices(range(heads), k=chance.randint(1, 3)) for _ in range(ranks)]
        for head in range(heads):
            if not any(head in each for each in held):
                chance.choice(held).append(head)
        held = [sorted(set(each)) if dim else sorted(each) for each in held]
        return Partition(heads, tuple(tuple((h, h + 1) for h in each) for each in held)).scaled(alignment)
    return even_partition(size, alignment, ranks)


class Plans:
    """Tensors one after the other, with their values and partitions; `write` puts them into files."""

    def __init__(self, chance: random.Random, scheme: Tiles, ranks: int, aligned: bool = True):
        self.chance, self.scheme, self.ranks, self.aligned = chance, scheme, ranks, aligned
        self.tensors: list[TensorPlan] = []
        self.values: dict[str, Tensor] = {}
        self.partitions: dict[str, Partition] = {}
        self.stored: dict[str, Tensor] = {}

    def add(self) -> None:
        """A tensor of any kind."""
        chance = self.chance
        name, quantized = f"t{len(self.tensors)}", chance.random() < 0.6
        shape = (chance.randint(1, 48), chance.choice([1, 6, 16, 24, 33, 48]))
        if not quantized and chance.random() < 0.4:
            shape = chance.choice([(chance.randint(1, 60),), (chance.randint(1, 4), *shape)])
        stored = chance.choice(["BF16", "F16", "F32"])
        dtype = chance.choice(["bfloat16", "float32"]) if chance.random() < 0.4 else _name(STORED[stored])
        transposed = quantized and chance.random() < 0.2
        dim, partition = self._partition(shape, quantized, transposed)
        if partition is not None:
            self.partitions[name] = partition
        value = torch.randint(0, 200, shape)
        self.values[name] = value.to(getattr(torch, dtype))
        sources = self._sources(name, value.T if transposed else value, stored, transposed)
        key = name if partition is not None else None
        scheme = "tiles" if quantized else "none"
        self.tensors.append(TensorPlan(name, shape, dtype, scheme, sources, dim, key, transposed))

    def _partition(
        self, shape: tuple[int, ...], quantized: bool, transposed: bool
    ) -> tuple[int | None, Partition | None]:
        dim = self.chance.choice([None, 0, 1])
        if (transposed and dim == 0) or (dim == 1 and len(shape) != 2):
            return None, None
        alignment = 1
        if quantized and dim is not None:
            alignment = (
                row_step(self.scheme.components, (shape[0], shape[1])) if dim == 0 else self._column_alignment(shape[1])
            )
        if dim is None or not alignment:
            return None, None
        partition = random_partition(self.chance, shape[dim], alignment, self.ranks, dim)
        return (dim, partition) if partition is not None else (None, None)

    def _column_alignment(self, width: int) -> int:
        """Returns the least alignment of a partition over columns; 0 where there is none."""
        local = [c for c in self.scheme.components if c.name not in self.scheme.whole]
        if any(c.flat and width % c.flat for c in local):
            return 0
        return math.lcm(*(c.flat or c.block_shape[1] for c in local if c.flat or c.block_shape[1] != ALL))

    def _sources(self, name: str, value: Tensor, stored: str, transposed: bool) -> tuple[Source, ...]:
        """One checkpoint tensor, or several on top of each other, of which one may be a part of a larger one."""
        kind = self.chance.choice(["one", "one", "two", "part"])
        if kind == "one" or transposed or len(value) < 2 or value.dim() > 2:
            self.stored[name] = value.to(STORED[stored])
            return (Source(name),)
        middle = self.chance.randint(1, len(value) - 1)
        parts = (value[:middle], value[middle:])
        extra = 0
        if kind == "part":
            extra = self.chance.randint(1, 3)
            parts = (torch.cat([torch.full_like(value[:1], 7).expand(extra, *value.shape[1:]), parts[0]]), parts[1])
        other = stored if self.scheme_step(value) > 1 else self.chance.choice([stored, "F32"])
        self.stored[f"{name}.a"], self.stored[f"{name}.b"] = parts[0].to(STORED[stored]), parts[1].to(STORED[other])
        offset = (0,) * value.dim()
        take = (0, extra, len(parts[0])) if extra else None
        return (Source(f"{name}.a", "", offset, take), Source(f"{name}.b", "", (middle, *offset[1:])))

    def scheme_step(self, value: Tensor) -> int:
        """Rows that are quantized together, and so must have one dtype."""
        return row_step(self.scheme.components, (value.shape[0], value.shape[-1])) if value.dim() == 2 else 1

    def write(self, folder: Path) -> dict[str, TensorInfo]:
        """Writes one or two files, with holes between some of the tensors."""
        infos, ends = {}, {}
        files = {f"{i}.bin": open(folder / f"{i}.bin", "wb") for i in range(self.chance.randint(1, 2))}  # noqa: SIM115
        for name, value in self.stored.items():
            file = self.chance.choice(sorted(files))
            start = ends.get(file, 8) + self.chance.choice([0, 0, 0, 40, 9000])
            start += -start % 8 if self.aligned else self.chance.randint(0, 3)
            raw = value.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
            files[file].seek(start)
            files[file].write(raw)
            dtype = next(key for key, known in STORED.items() if known == value.dtype)
            infos[name] = TensorInfo(
                name=name, dtype=dtype, shape=tuple(value.shape), file=file, offset=start, nbytes=len(raw)
            )
            ends[file] = start + len(raw)
        for file in files.values():
            file.close()
        return infos


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
