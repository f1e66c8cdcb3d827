"""Brute force over partitions: what each rank stores, and who owns what."""

from __future__ import annotations

from distquant.sharding.partition import Partition


def held(partition: Partition, rank: int) -> list[int]:
    """Elements that a rank stores, in local order."""
    return [element for start, stop in partition.segments(rank) for element in range(start, stop)]


def assert_owned_partitions(partition: Partition) -> None:
    """Every element has one owner, which stores it where `owned` says."""
    owners: dict[int, int] = {}
    for rank in range(len(partition.parts)):
        local = held(partition, rank)
        for (start, stop), at in partition.owned(rank):
            assert start < stop
            assert local[at : at + stop - start] == list(range(start, stop))
            for element in range(start, stop):
                assert element not in owners, f"{element} is owned by {owners[element]} and {rank}"
                owners[element] = rank
    assert set(owners) == set(range(partition.size))
    first_holder: dict[int, int] = {}
    for rank in range(len(partition.parts)):
        for element in held(partition, rank):
            first_holder.setdefault(element, rank)
    assert owners == first_holder
