"""The simulated device for tests, in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import simulated
from apart import Apart


@pytest.fixture(scope="session")
def sim() -> Iterator[Apart]:
    """`sim(function, *arguments)` calls a module-level function where `sim` is a device."""
    if simulated.compiler() is None:
        pytest.skip("no C++ compiler (g++) to build the simulated device with")
    process = Apart(simulated.built())
    yield process
    process.close()
