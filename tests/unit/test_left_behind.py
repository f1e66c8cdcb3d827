"""What a launcher has started or made vanishes with it, also if it is killed, and if what it has started is stopped."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

LAUNCHER = """
import os, signal, subprocess, sys, time
from distquant.left_behind import guard_process, temporary_folder
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
with temporary_folder() as folder:
    open(os.path.join(folder, "file"), "w").close()
    guard_process(child.pid)
    child.send_signal(signal.SIGSTOP)
    print(child.pid, folder, flush=True)
    if sys.argv[1:] == ["killed"]:
        os.kill(os.getpid(), signal.SIGKILL)
child.kill()
"""


def test_a_killed_launcher_leaves_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", LAUNCHER, "killed"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as launcher:
        assert launcher.stdout is not None
        child, folder = launcher.stdout.readline().split()
        handle = os.pidfd_open(int(child))
        try:
            assert launcher.wait() == -signal.SIGKILL
            assert select.select([handle], [], [], 60)[0], "the child lives"
        finally:
            os.close(handle)
    deadline = time.monotonic() + 60
    while os.path.exists(folder) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(folder)


def test_a_launcher_that_ends_leaves_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", LAUNCHER], check=True, env=environment, capture_output=True)
    assert not list(tmp_path.iterdir())
