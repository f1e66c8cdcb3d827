"""Memory for what a load keeps: the caller's tensors, on pages that are there already."""

from __future__ import annotations

import errno
import mmap
import re
from pathlib import Path

import pytest
import torch

from distquant import memory
from distquant.memory import HUGE_PAGE, LONGEST, PAUSE, SAMPLED, SLOW, SMALLEST, Memory

CPU = torch.device("cpu")
LINUX = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="huge pages are asked for on Linux only")


def resident() -> int:
    found = re.search(r"^VmRSS:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found.group(1)) * 1024


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nbytes", [0, 4, SMALLEST - 4, SMALLEST, SMALLEST + 4, 3 * HUGE_PAGE + 20])
def test_tensors_have_the_size_that_was_asked_for(nbytes: int, dtype: torch.dtype) -> None:
    count = nbytes // dtype.itemsize
    made = Memory().empty(count, dtype, CPU)
    assert (made.numel(), made.dtype, made.device, made.dim()) == (count, dtype, CPU, 1)
    assert made.untyped_storage().nbytes() == made.nbytes  # what is saved of it is it alone
    made.fill_(1)
    assert made.sum(dtype=torch.float64).item() == count


def test_devices_other_than_the_cpu_have_their_own() -> None:
    assert Memory().empty(SMALLEST, torch.uint8, torch.device("meta")).is_meta


@LINUX
@pytest.mark.parametrize("slow", [False, True])
def test_memory_is_gone_with_the_last_view(slow: bool) -> None:
    source, size = Memory(), 64 << 20
    source._left_out = size // HUGE_PAGE if slow else 0
    before = resident()
    made = source.empty(size, torch.uint8, CPU)
    if slow:
        assert resident() - before > size - (1 << 20), "small pages are there before they are written to"
    made.fill_(1)
    assert resident() - before > size - (1 << 20)
    view = made[5:9]
    del made
    assert resident() - before > size - (1 << 20)
    del view
    assert resident() - before < 1 << 20


@LINUX
def test_slow_huge_pages_are_left_out_ever_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    slow = [False]

    def advise(address: int, nbytes: int, advice: int) -> None:
        asked.append((advice, nbytes))
        clock[0] += 2 * SLOW if slow[0] else SLOW / 4

    clock = [0.0]
    monkeypatch.setattr(memory, "_advise", advise)
    monkeypatch.setattr(memory.time, "thread_time", lambda: clock[0])
    source, quick = Memory(), [0]

    def huge_pages_of(pages: int) -> int:
        """Those among so many; one of `SAMPLED` of all, and every small one, must have been taken at once."""
        asked.clear()
        made = source.empty(pages * HUGE_PAGE, torch.uint8, CPU)
        huge = [nbytes // HUGE_PAGE for advice, nbytes in asked if advice == mmap.MADV_HUGEPAGE]
        taken = [nbytes // HUGE_PAGE for advice, nbytes in asked if advice == memory.POPULATE_WRITE]
        timed = sum(huge)
        if not slow[0]:
            before, quick[0] = quick[0], quick[0] + sum(huge)
            timed = -(-quick[0] // SAMPLED) + before // -SAMPLED
        assert sum(taken) == made.nbytes // HUGE_PAGE - sum(huge) + timed
        return sum(huge)

    assert huge_pages_of(4) == 4
    assert huge_pages_of(2 * SAMPLED + 1) == 2 * SAMPLED + 1
    slow[0], source._untimed = True, 0
    assert huge_pages_of(4) == 1  # one to see it, three of those that are left out
    assert huge_pages_of(PAUSE - 3) == 0
    assert huge_pages_of(1) == 1
    assert huge_pages_of(2 * PAUSE) == 0
    for _ in range(20):
        huge_pages_of(1)
        source._left_out = 0
    assert huge_pages_of(1) == 1
    assert huge_pages_of(LONGEST) == 0, "and no longer than that"
    slow[0], quick[0] = False, 0
    assert huge_pages_of(8) == 8


@LINUX
def test_a_kernel_that_knows_no_such_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(address: int, nbytes: int, advice: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(memory, "_advise", unknown)
    source = Memory()
    for _ in range(2):
        made = source.empty(SMALLEST, torch.uint8, CPU)
        assert made.fill_(3).sum().item() == 3 * SMALLEST
