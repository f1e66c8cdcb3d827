"""Places where an output cannot be written, and references of the cache that name no snapshot."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from fault_limits import drop
from trials import command

OPTIONS = ("--report", "--trace", "--json", "--html")


def _missing(folder: Path) -> Path:
    return folder / "none" / "out"


def _folder(folder: Path) -> Path:
    (folder / "out").mkdir()
    return folder / "out"


def _below_a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "out"


def _unwritable_folder(folder: Path) -> Path:
    (folder / "closed").mkdir(mode=0o555)
    return folder / "closed" / "out"


def _unwritable_file(folder: Path) -> Path:
    (folder / "out").write_text("before")
    (folder / "out").chmod(0o444)
    folder.chmod(0o755)
    return folder / "out"


def _long_name(folder: Path) -> Path:
    return folder / ("o" * 300)


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "out")
    return folder / "out"


def _itself(folder: Path) -> Path:
    (folder / "out").symlink_to("out")
    return folder / "out"


def _full_device(folder: Path) -> Path:
    return Path("/dev/full")


def _empty(folder: Path) -> Path:
    return Path("")


def _nul(folder: Path) -> Path:
    return folder / "\udcff\x1b[2J"


def _mount(options: str, fill: bool) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        place = folder / "mounted"
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(place)], check=True)
        if fill:
            with open(place / "fill", "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
        return place / "out"

    return make


def unmount(folder: Path) -> None:
    """Undoes a mount below a folder."""
    if (folder / "mounted").is_mount():
        subprocess.run(["umount", str(folder / "mounted")], check=True)


OUTPUTS: dict[str, Callable[[Path], Path]] = {
    "in no folder": _missing,
    "a folder": _folder,
    "below a file": _below_a_file,
    "in a folder that is closed": _unwritable_folder,
    "a file that is closed": _unwritable_file,
    "of a long name": _long_name,
    "a pipe": _pipe,
    "a link to itself": _itself,
    "a device that is full": _full_device,
    "of no name": _empty,
    "of bytes that are no text": _nul,
}
"""Name -> what makes a path below a folder to which nothing can be written."""

if os.geteuid() == 0:
    OUTPUTS["on a full disk"] = _mount("size=64k", True)
    OUTPUTS["on a disk of few bytes"] = _mount("size=4k", False)
    OUTPUTS["on a disk without inodes"] = _mount("nr_inodes=2,size=64k", True)
    OUTPUTS["on a read-only disk"] = _mount("ro", False)


def written(option: str, make: Callable[[Path], Path], quant: Sequence[str]) -> Callable[[Path], Callable[[], int]]:
    """Returns a trial that writes an output to such a path; nothing partial may be left."""

    def of(model: Path) -> Callable[[], int]:
        path = make(model.parent)
        name = "load" if option in ("--report", "--trace") else "plan"
        run = command(name, str(model), *quant, option, str(path) if str(path) != "." else "")

        def both() -> int:
            drop()
            return run()

        return both

    return of


def _text(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _closed(path: Path) -> None:
    path.write_text("abc")
    path.chmod(0)


REFERENCES: dict[str, Callable[[Path], object]] = {
    "nothing": _text(b""),
    "spaces": _text(b" \n"),
    "bytes that are no text": _text(b"\xff\xfe\x00"),
    "a path outside": _text(b"../../../etc"),
    "an absolute path": _text(b"/etc"),
    "a zero byte": _text(b"abc\x00def"),
    "control characters": _text(b"\x1b[2J"),
    "two lines": _text(b"abc\ndef"),
    "too long": _text(b"a" * 4000),
    "over its limit": _text(b"a" * 5000),
    "a pipe": lambda path: os.mkfifo(path),
    "a folder": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a closed file": _closed,
}
"""Name -> what makes a `refs/main` that names no snapshot."""


def cached(make: Callable[[Path], object]) -> Callable[[Path], Callable[[], int]]:
    """Returns a trial that looks a model up in a cache with such a reference."""

    def of(model: Path) -> Callable[[], int]:
        cache = model.parent / "hub"
        refs = cache / "models--org--name" / "refs"
        refs.mkdir(parents=True)
        shutil.copytree(model, cache / "models--org--name" / "snapshots" / "abc")
        make(refs / "main")
        run = command("load", "org/name", "--cache-dir", str(cache))

        def both() -> int:
            drop()
            return run()

        return both

    return of
