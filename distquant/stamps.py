"""Facts of the system about a file, and which of them show that the file's bytes may be others than before.

A header says where the weights are, so the weights must be those that belong to it. Nobody reads them twice to be sure;
the file's size and times tell.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime, timezone

LEAVES_BYTES = ("links", "mode", "owner", "group")
"""Facts whose change alone explains a new time of change: a hard link, chmod or chown writes no bytes."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """Facts about a file at one time; times in nanoseconds since 1970, as the file's own system has them.

    Attributes:
        inode: number of the file on its disk.
        size: in bytes.
        written: time at which its bytes were written last. Anyone who may write the file can set it back.
        changed: time at which its bytes or facts were changed last. Nobody sets it.
        links: number of its names.
        mode: kind and permissions.
        owner: number of the user.
        group: number of the group.
    """

    inode: int
    size: int
    written: int
    changed: int
    links: int
    mode: int
    owner: int
    group: int

    @classmethod
    def of(cls, file: int | str | os.PathLike[str]) -> Stamp:
        """Returns the facts of an open file, or of a path's."""
        status = os.stat(file)
        return cls(
            status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns,
            status.st_nlink, status.st_mode, status.st_uid, status.st_gid,
        )  # fmt: skip

    def change(self, now: Stamp) -> str | None:
        """Returns what shows that bytes may have changed from this time to another; None if nothing does.

        The inode alone shows nothing: some file systems number a file anew whenever they forget it. A file that took
        another's place has another time of change.
        """
        if now.size != self.size:
            return f"it had {self.size} bytes, and has {now.size} now"
        if now.written != self.written:
            return f"it was last written at {_utc(self.written)}, and now at {_utc(now.written)}"
        if now.changed == self.changed:
            return None
        if now.inode != self.inode:
            return "another file has taken its place"
        if any(getattr(now, fact) != getattr(self, fact) for fact in LEAVES_BYTES):
            return None
        return f"it was last changed at {_utc(self.changed)}, and now at {_utc(now.changed)}"


def _utc(nanoseconds: int) -> str:
    """Returns a time to the microsecond; any number is one, as a file system may hold any."""
    try:
        return datetime.fromtimestamp(nanoseconds / 1e9, timezone.utc).isoformat(sep=" ", timespec="microseconds")
    except (OverflowError, ValueError, OSError):
        return f"{nanoseconds} ns"
