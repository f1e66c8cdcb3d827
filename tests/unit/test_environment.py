"""Unknown facts, usable cores, and versions of packages that are not imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distquant.environment import Environment, cpu_limit, installed, rank_threads, usable_cores


def test_installed_reads_versions_and_imports_nothing():
    found = installed("torch")
    assert found is not None
    assert found.partition("+")[0] == torch.__version__.partition("+")[0]  # CUDA builds add it to one of the two alone
    assert installed("no-such-package-of-ours") is None
    before = set(sys.modules)
    installed("pip")
    assert not {name for name in set(sys.modules) - before if name.startswith("pip")}


def test_unknown_facts():
    environment = Environment()
    assert (environment.device_type, environment.device_count, environment.capability, environment.memory) == (
        None,
    ) * 4
    assert environment.memory_source == "unknown"
    assert Environment().packages is not environment.packages


def test_usable_cores_are_those_of_the_affinity_mask():
    """In a process of its own, bound to one core of this machine."""
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from distquant.environment import rank_threads, usable_cores; print(usable_cores(), rank_threads(1))"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]


def cgroup(folder: Path, line: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A tree of cgroups with these files, and the file that names the process's own group."""
    own = folder / "cgroup"
    own.write_text(line + "\n")
    for name, text in files.items():
        path = folder / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return folder / "tree", own


@pytest.mark.parametrize(
    ("line", "files", "limit"),
    [
        ("0::/", {}, None),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "250000 100000"}, 2.5),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/a/b", {"a/b/cpu.max": "100000 100000", "a/cpu.max": "300000 100000"}, 1),
        ("0::/host/path", {"cpu.max": "50000 100000"}, 0.5),
        ("4:cpu,cpuacct:/x", {"cpu/x/cpu.cfs_quota_us": "400000", "cpu/x/cpu.cfs_period_us": "100000"}, 4),
        ("4:cpu,cpuacct:/x", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("4:memory:/x", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_cpu_limit_of_cgroups(tmp_path: Path, line: str, files: dict[str, str], limit: float | None):
    assert cpu_limit(*cgroup(tmp_path, line, files)) == limit


@pytest.mark.parametrize(
    ("asked", "ranks", "threads"), [("3", 1, 3), ("3", 8, 3), ("3,2", 2, 3), ("0", 10**6, 1), ("many", 10**6, 1)]
)
def test_threads_of_a_rank(monkeypatch: pytest.MonkeyPatch, asked: str, ranks: int, threads: int):
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert rank_threads(ranks) == threads


def test_threads_of_a_rank_are_its_part_of_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert rank_threads(1) == usable_cores()
    assert rank_threads(usable_cores()) == 1
