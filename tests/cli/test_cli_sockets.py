"""What listens while ranks of one machine load: nothing that another machine could reach."""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys
import time

import psutil
import pytest


def listening(process: psutil.Process) -> set[tuple[str, int, int]]:
    """Address, port and process of the TCP sockets that a process and its children listen at."""
    found = set()
    for one in [process, *process.children(recursive=True)]:
        try:
            sockets = one.net_connections(kind="inet")
        except psutil.Error:  # it has ended meanwhile
            continue
        found |= {(s.laddr.ip, s.laddr.port, one.pid) for s in sockets if s.status == psutil.CONN_LISTEN}
    return found


def on_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    mapped = getattr(ip, "ipv4_mapped", None)  # Ray's listen at IPv4's loopback by an IPv6 socket
    return (mapped or ip).is_loopback


@pytest.mark.parametrize("runtime", ["torchrun", "ray"])
def test_ranks_of_one_machine_listen_on_loopback_only(kjv_tiny, runtime):
    command = [sys.executable, "-m", "distquant", "load", kjv_tiny, "--quant", "nf4", "--mesh", "tp=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    more = ["--runtime", runtime, "--prompt", "In the beginning", "--max-new-tokens", "60"]
    with subprocess.Popen([*command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as run:
        found: set[tuple[str, int, int]] = set()
        try:
            root = psutil.Process(run.pid)
            while run.poll() is None:
                found |= listening(root)
                time.sleep(0.02)
        except psutil.NoSuchProcess:
            pass
        finally:
            run.kill()
        assert run.stdout is not None and run.stderr is not None
        errors = run.stderr.read().decode()
    assert run.returncode == 0, errors[-3000:]
    assert len({process for _, _, process in found}) > 1, "neither the store nor a rank was seen"
    assert [one for one in sorted(found) if not on_loopback(one[0])] == []
