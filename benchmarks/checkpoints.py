"""The files of a checkpoint as benchmarks meet them: described, brought into the page cache or out of it, and read."""

from __future__ import annotations

import glob
import json
import math
import mmap
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHUNK = 8 << 20
"""Bytes of a read."""


def shards(path: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(path), "*.safetensors")))


def total_bytes(path: str) -> int:
    """Bytes of all files, headers included."""
    return sum(map(os.path.getsize, shards(path)))


def tensors(path: str) -> dict[str, tuple[tuple[int, ...], int]]:
    """(shape, bytes) of every tensor, by name, from the headers."""
    found = {}
    for file in shards(path):
        with open(file, "rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                found[name] = (tuple(entry["shape"]), stop - start)
    return found


def describe(path: str) -> str:
    """Model, size and dimensions in a line."""
    config = json.loads((Path(path) / "config.json").read_text())
    parameters = sum(math.prod(shape) for shape, _ in tensors(path).values())
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    known = ", ".join(f"{name} {config[name]}" for name in (*fields, "vocab_size") if name in config)
    what = f"{config.get('architectures', ['?'])[0]}, {parameters / 1e9:.2f} B parameters"
    return f"{what}, {total_bytes(path) / 1e9:.2f} GB in {len(shards(path))} files ({known})."


def drop(path: str) -> None:
    """Takes the files out of the page cache."""
    for file in shards(path):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # pages that are not on the disk yet would stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def reader(path: str, threads: int, direct: bool = False, part: slice = slice(None)) -> Callable[[], int]:
    """A call that reads all files once, keeps nothing and returns the bytes; its buffers are warm already.

    Args:
        path: folder of the files.
        threads: each takes the next chunk of `CHUNK` bytes, and has one buffer.
        direct: past the page cache.
        part: which of the chunks.
    """
    sizes = {file: os.path.getsize(file) for file in shards(path)}
    chunks = [(file, offset) for file, size in sizes.items() for offset in range(0, size, CHUNK)][part]
    buffers = [mmap.mmap(-1, CHUNK) for _ in range(threads)]
    for buffer in buffers:
        buffer.write(bytes(CHUNK))

    def run() -> int:
        opened = _open(list(sizes), direct)
        waiting = iter(chunks)

        def work(buffer: mmap.mmap) -> int:
            return sum(_fill(opened[file], offset, buffer, sizes[file]) for file, offset in waiting)

        try:
            if threads == 1:
                return work(buffers[0])
            with ThreadPoolExecutor(threads) as pool:
                return sum(pool.map(work, buffers))
        finally:
            for descriptor in opened.values():
                os.close(descriptor)

    return run


def _open(files: list[str], direct: bool) -> dict[str, int]:
    try:
        return {file: os.open(file, os.O_RDONLY | (os.O_DIRECT if direct else 0)) for file in files}
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}" + (" (with O_DIRECT)" if direct else ""))


def _fill(descriptor: int, offset: int, buffer: mmap.mmap, size: int) -> int:
    """Reads a chunk, less at the end of the file."""
    done, view = 0, memoryview(buffer)
    while done < CHUNK and offset + done < size:
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done
