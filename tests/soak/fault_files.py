"""What may happen to a file of weights: damage before a load, and changes under it."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

SHARDS = tuple(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))


def other_bytes(path: Path) -> bytes:
    """Returns the file's bytes with the same header and other weights."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = bytes(byte ^ 0x11 for byte in content[start:])
    return bytes(content)


def overwrite(path: Path) -> None:
    """Writes other weights into the same file."""
    content = other_bytes(path)
    with open(path, "r+b") as file:
        file.write(content)


def overwrite_last_byte(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes((last[0] ^ 0x11,)))


def overwrite_and_set_back(path: Path) -> None:
    """Hides the writing, as far as a user can: the time of the last writing is set back."""
    before = path.stat()
    overwrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap(path: Path) -> None:
    """Puts another file in its place."""
    beside = path.with_suffix(".other")
    beside.write_bytes(other_bytes(path))
    os.replace(beside, path)


def swap_and_set_back(path: Path) -> None:
    before = path.stat()
    swap(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap_by_link(path: Path) -> None:
    beside = path.with_suffix(".other")
    beside.write_bytes(other_bytes(path))
    path.unlink()
    path.symlink_to(beside.name)


def rewrite(path: Path) -> None:
    """Empties the file and writes other weights, as `cp` does."""
    content = other_bytes(path)
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def delete(path: Path) -> None:
    path.unlink()


def delete_folder(path: Path) -> None:
    shutil.rmtree(path.parent)


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def to_socket(path: Path) -> None:
    path.unlink()
    folder = os.open(path.parent, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


def to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def touch(path: Path) -> None:
    os.utime(path)


def link(path: Path) -> None:
    os.link(path, path.with_suffix(".link"))


def chmod(path: Path) -> None:
    path.chmod(0o600)


def same_bytes(path: Path) -> None:
    content = path.read_bytes()
    beside = path.with_suffix(".other")
    beside.write_bytes(content)
    os.replace(beside, path)


CHANGES: dict[str, Callable[[Path], None]] = {
    change.__name__.replace("_", " "): change
    for change in (
        overwrite, overwrite_last_byte, overwrite_and_set_back, swap, swap_and_set_back, swap_by_link, rewrite, cut,
        empty, grow, delete, delete_folder, to_pipe, to_folder, to_device, to_socket, to_itself, touch, link, chmod,
        same_bytes,
    )
}  # fmt: skip

BETWEEN = CHANGES
"""Name -> what happens between the reading of the header and the opening for the weights."""

AT_A_READ = CHANGES
"""Name -> what happens during a read of the weights."""


def _cut_to(size: Callable[[int, int], int]) -> Callable[[Path, float], None]:
    """Returns a fault that cuts a file to a size, from the size of its header and its own."""

    def change(path: Path, _: float) -> None:
        with open(path, "rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
        os.truncate(path, size(header, path.stat().st_size))

    return change


def _cut_somewhere(path: Path, where: float) -> None:
    os.truncate(path, int(path.stat().st_size * where))


def _mode(mode: int, of_folder: bool = False) -> Callable[[Path, float], None]:
    return lambda path, _: (path.parent if of_folder else path).chmod(mode)


def _beside(name: str, change: Callable[[Path], None]) -> Callable[[Path, float], None]:
    return lambda path, _: change(path.with_name(name))


INDEX = "model.safetensors.index.json"

BEFORE: dict[str, Callable[[Path, float], None]] = {
    **{f"{name} before": (lambda path, _, change=change: change(path)) for name, change in CHANGES.items()
       if change in (cut, empty, grow, delete, to_pipe, to_folder, to_device, to_socket, to_itself)},
    **{f"cut to byte {size}": _cut_to(lambda header, whole, size=size: size) for size in (1, 4, 7, 8, 9, 100)},
    "cut within the header": _cut_to(lambda header, whole: header // 2),
    "cut before the header's end": _cut_to(lambda header, whole: header - 1),
    "cut at the header's end": _cut_to(lambda header, whole: header),
    "cut after the first byte of weights": _cut_to(lambda header, whole: header + 1),
    "cut by one byte": _cut_to(lambda header, whole: whole - 1),
    "cut at a page": _cut_to(lambda header, whole: whole // 4096 * 4096),
    "cut somewhere": _cut_somewhere,
    "not readable": _mode(0o000),
    "folder not readable": _mode(0o000, of_folder=True),
    "folder cannot be listed": _mode(0o311, of_folder=True),
    "folder cannot be entered": _mode(0o644, of_folder=True),
    "config not readable": lambda path, _: path.with_name("config.json").chmod(0),
    "index not readable": lambda path, _: path.with_name(INDEX).chmod(0),
    **{f"index: {name}": _beside(INDEX, CHANGES[name]) for name in
       ("cut", "empty", "to pipe", "to folder", "to device", "to itself")},
    **{f"config.json: {name}": _beside("config.json", CHANGES[name]) for name in
       ("cut", "empty", "delete", "to pipe", "to folder", "to device", "to itself")},
    **{f"generation_config.json: {name}": _beside("generation_config.json", CHANGES[name]) for name in
       ("cut", "empty", "to pipe", "to folder", "to device", "to itself")},
}  # fmt: skip
"""Name -> damage before the command, to a shard or to a file beside it; with a number between 0 and 1."""
