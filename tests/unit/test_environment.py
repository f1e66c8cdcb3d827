"""Unknown facts, and versions of packages that are not imported."""

from __future__ import annotations

import sys

import torch

from distquant.environment import Environment, installed


def test_installed_reads_versions_and_imports_nothing():
    assert installed("torch") == torch.__version__
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
