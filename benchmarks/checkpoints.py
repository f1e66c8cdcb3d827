"""The files of a checkpoint for benchmarks: described, read, and put into the page cache or dropped from it."""

from __future__ import annotations

import glob
import json
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CHUNK = 8 << 20
"""Bytes of a read."""
DIMENSIONS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_local_experts", "num_attention_heads",
    "num_key_value_heads", "vocab_size",
)  # fmt: skip
"""Fields of a model's configuration that describe its size."""


def shards(path: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(path), "*.safetensors")))


def total_bytes(path: str) -> int:
    """Bytes of all files, headers included."""
    return sum(map(os.path.getsize, shards(path)))


def headers(path: str) -> Iterator[tuple[str, int, dict[str, dict[str, Any]]]]:
    """Returns (file, its first byte of data, entry of every tensor by name) for every file."""
    for file in shards(path):
        with open(file, "rb") as prepared:
            size = int.from_bytes(prepared.read(8), "little")
            entries = json.loads(prepared.read(size))
        entries.pop("__metadata__", None)
        yield file, 8 + size, entries


def tensors(path: str) -> dict[str, tuple[tuple[int, ...], int]]:
    """Returns (shape, bytes) of every tensor, by name, from the headers."""
    sizes = {}
    for _, _, entries in headers(path):
        for name, entry in entries.items():
            start, stop = entry["data_offsets"]
            sizes[name] = (tuple(entry["shape"]), stop - start)
    return sizes


def places(path: str) -> dict[str, list[tuple[int, int, str]]]:
    """Returns (first byte, byte after the last, name) of every tensor in its file's order, by the file's real path."""
    return {
        os.path.realpath(file): sorted(
            (data + entry["data_offsets"][0], data + entry["data_offsets"][1], name) for name, entry in entries.items()
        )
        for file, data, entries in headers(path)
    }


def describe(path: str) -> str:
    """Describes model, size and dimensions in a line."""
    config = json.loads((Path(path) / "config.json").read_text())
    parameters = sum(math.prod(shape) for shape, _ in tensors(path).values())
    known = ", ".join(f"{name} {config[name]}" for name in DIMENSIONS if name in config)
    size = f"{config.get('architectures', ['?'])[0]}, {parameters / 1e9:.2f} B parameters"
    return f"{size}, {total_bytes(path) / 1e9:.2f} GB in {len(shards(path))} files ({known})."


def drop(path: str) -> None:
    """Drops the files from the page cache."""
    for file in shards(path):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # pages that are not on the disk yet would not be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def reader(path: str, threads: int, direct: bool = False, part: slice = slice(None)) -> Callable[[], int]:
    """Returns a call that reads all files once, keeps nothing and returns the bytes; its buffers are warm.

    Args:
        path: folder of the files.
        threads: number of threads; each takes the next chunk of `CHUNK` bytes, and has one buffer.
        direct: True to bypass the page cache.
        part: the chunks to read.
    """
    sizes, chunks = _chunks(path)
    chunks = chunks[part]
    buffers = [mmap.mmap(-1, CHUNK) for _ in range(threads)]
    for buffer in buffers:
        buffer.write(bytes(CHUNK))

    def run() -> int:
        prepared = _open(list(sizes), direct)
        waiting = iter(chunks)

        def work(buffer: mmap.mmap) -> int:
            return sum(_fill(prepared[file], offset, buffer, sizes[file]) for file, offset in waiting)

        try:
            if threads == 1:
                return work(buffers[0])
            with ThreadPoolExecutor(threads) as pool:
                return sum(pool.map(work, buffers))
        finally:
            for descriptor in prepared.values():
                os.close(descriptor)

    return run


def copier(path: str, threads: int) -> Callable[[], list[mmap.mmap]]:
    """Returns a call that reads all files once into new memory (huge pages if the machine has them) and returns it."""
    sizes, chunks = _chunks(path)

    def run() -> list[mmap.mmap]:
        prepared = _open(list(sizes), direct=False)
        waiting = iter(chunks)

        def work(_: int) -> list[mmap.mmap]:
            kept = []
            for file, offset in waiting:
                memory = mmap.mmap(-1, CHUNK, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                memory.madvise(mmap.MADV_HUGEPAGE)
                _fill(prepared[file], offset, memory, sizes[file])
                kept.append(memory)
            return kept

        try:
            with ThreadPoolExecutor(threads) as pool:
                return [memory for kept in pool.map(work, range(threads)) for memory in kept]
        finally:
            for descriptor in prepared.values():
                os.close(descriptor)

    return run


def _chunks(path: str) -> tuple[dict[str, int], list[tuple[str, int]]]:
    """Returns the bytes of every file, and (file, offset) of every chunk."""
    sizes = {file: os.path.getsize(file) for file in shards(path)}
    return sizes, [(file, offset) for file, size in sizes.items() for offset in range(0, size, CHUNK)]


def _open(files: list[str], direct: bool) -> dict[str, int]:
    try:
        return {file: os.open(file, os.O_RDONLY | (os.O_DIRECT if direct else 0)) for file in files}
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}" + (" (with O_DIRECT)" if direct else ""))


def _fill(descriptor: int, offset: int, buffer: mmap.mmap, size: int) -> int:
    """Reads a chunk, or less at the end of the file."""
    done, view = 0, memoryview(buffer)
    while done < CHUNK and offset + done < size:
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done
