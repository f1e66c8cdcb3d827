"""The TCP sockets at which processes listen, while they run."""

from __future__ import annotations

import os
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import psutil

LISTEN = "0A"
"""State of a socket in Linux's tables."""


def listening(process: psutil.Process) -> set[tuple[str, int, int]]:
    """Address, port and process of the TCP sockets that a process and its children listen at."""
    found = set()
    for one in [process, *process.children(recursive=True)]:
        with suppress(OSError):  # it has ended meanwhile
            own = _sockets(one.pid)
            found |= {(str(host), port, one.pid) for inode, host, port in _listeners(one.pid) if inode in own}
    return found


def _sockets(process: int) -> set[str]:
    found = set()
    for descriptor in Path(f"/proc/{process}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    return found


def _listeners(process: int) -> Iterator[tuple[str, IPv4Address | IPv6Address, int]]:
    """Inode, address and port of what listens in a process's network (psutil knows this process's network only)."""
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, _, _, _, _, _, inode, *_ = line.split()
            if state == LISTEN:
                digits, port = local.split(":")
                words = [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]  # as the processor has them
                yield inode, ip_address(struct.pack(f"={len(words)}I", *words)), int(port, 16)


GUARD = 300.0
"""Seconds after which processes are taken to hang."""


def own_environment(**more: str) -> dict[str, str]:
    """This process's environment, without the interfaces that a load in it has chosen for its own ranks."""
    chosen = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {**{name: value for name, value in os.environ.items() if name not in chosen}, "OMP_NUM_THREADS": "1", **more}


def heard(runs: Sequence[subprocess.Popen[bytes]]) -> list[set[tuple[str, int, int]]]:
    """What each of some processes listened at until all have ended; their output is read afterwards.

    They are ended when one has failed, for which the others might wait, or when they take too long.
    """
    found: list[set[tuple[str, int, int]]] = [set() for _ in runs]
    until = time.monotonic() + GUARD
    try:
        while any(run.poll() is None for run in runs) and not any(run.poll() for run in runs):
            if time.monotonic() > until:
                break
            for run, own in zip(runs, found, strict=True):
                try:
                    own |= listening(psutil.Process(run.pid))
                except psutil.NoSuchProcess:
                    continue
            time.sleep(0.02)
    finally:
        for run in runs:
            run.kill()
    return found


def on_loopback(address: str) -> bool:
    ip = ip_address(address)
    mapped = getattr(ip, "ipv4_mapped", None)  # Ray's listen at IPv4's loopback by an IPv6 socket
    return (mapped or ip).is_loopback
