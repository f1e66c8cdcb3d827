"""Finds out if a file lies on a disk of this machine. Only there may its pages be mapped without being asked to.

A page of a mapped file may be read long after the load. If it cannot be, the system ends the process (SIGBUS), so the
file must be on something that does not go away as a network does.
"""

from __future__ import annotations

import ctypes
import sys

LOCAL = {
    0xEF53: "ext2, ext3 and ext4",
    0x58465342: "XFS",
    0x9123683E: "Btrfs",
    0x2FC12FC1: "ZFS",
    0xCA451A4E: "bcachefs",
    0xF2F52010: "F2FS",
    0x01021994: "tmpfs",
    0x858458F6: "ramfs",
    0x794C7630: "overlayfs, of containers",
    0x73717368: "SquashFS",
    0xE0F5E1E2: "EROFS",
}
"""Linux' numbers of local file systems (statfs(2), linux/magic.h). All others may go away: NFS, CIFS, FUSE, Lustre,
GPFS, Ceph, 9P and those that are not known here."""

_STATFS_BYTES = 256
"""More than any Linux' `struct statfs` has (120 bytes on 64-bit machines)."""


def is_local(fd: int) -> bool:
    """Returns True if an open file is known to lie on a local file system; False where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return False
    libc, facts = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(_STATFS_BYTES)
    if libc.fstatfs(ctypes.c_int(fd), facts):
        return False
    # `f_type` comes first, in a word of the machine; the numbers have 32 bits.
    word = facts.raw[: ctypes.sizeof(ctypes.c_long)]
    return int.from_bytes(word, sys.byteorder) & 0xFFFFFFFF in LOCAL
