"""Sizes read from text and written as text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distquant.errors import InputError
from distquant.units import format_bytes, parse_bytes

PROPERTY = settings(deadline=None, derandomize=True, max_examples=200)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GiB", 24 * 2**30),
        ("512MiB", 2**29),
        ("80GB", 80 * 10**9),
        (" 1.5 KiB ", 1536),
        ("1TB", 10**12),
        ("2PiB", 2**51),
        ("24gb", 24 * 10**9),
        ("24G", 24 * 10**9),
        ("24g", 24 * 10**9),
        ("24gib", 24 * 2**30),
        ("24Gi", 24 * 2**30),
        ("1024", 1024),
        ("17B", 17),
        ("17b", 17),
        ("0", 0),
        (0, 0),
        (12345678901234567, 12345678901234567),
    ],
)
def test_parse_bytes(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "GiB", "24 gigs", "-1", -1, "1,5GiB", "1e3", "24 GiB free", "24iB", "nan", ".5GiB", None, "1_000"]
)
def test_what_is_no_size(text):
    with pytest.raises(InputError, match=r"^--max-memory: invalid size .*\. Write it as 24GiB"):
        parse_bytes(text, "--max-memory")


@pytest.mark.parametrize("size", ["24", 24, "1023", " 8 ", "1.5", 1])
def test_a_small_number_without_a_unit_asks_for_one(size):
    number = str(size).strip()
    with pytest.raises(InputError, match=rf"^--max-memory: {number} has no unit\. Write {number}GiB, .* or {number}B"):
        parse_bytes(size, "--max-memory")


@PROPERTY
@given(st.integers(0, 10**6), st.integers(0, 999), st.sampled_from([("KB", 1000), ("MB", 1000**2), ("GB", 1000**3)]))
def test_decimal_sizes_lose_nothing(whole, thousandths, unit):
    """Three decimals of a decimal unit are whole bytes, so they are read exactly."""
    letters, size = unit
    assert parse_bytes(f"{whole}.{thousandths:03d}{letters}") == whole * size + thousandths * size // 1000


@PROPERTY
@given(st.integers(1024, 2**63 - 1))
def test_plain_numbers_are_read_exactly(count):
    assert parse_bytes(str(count)) == count


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (24 * 2**30, "24.00 GiB"),
        (5 * 2**40, "5.00 TiB"),
        (5000 * 2**40, "5000.00 TiB"),
        (-2048, "-2.00 KiB"),
    ],
)
def test_format_bytes(count, text):
    assert format_bytes(count) == text


@PROPERTY
@given(st.integers(0, 2**50))
def test_format_reads_back_within_its_two_decimals(count):
    text = format_bytes(count).replace(" ", "")
    unit = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[text.lstrip("0123456789.")]
    assert abs(parse_bytes(text) - count) <= 0.0051 * unit + 1
    assert count >= unit or unit == 1


@pytest.mark.parametrize("size", ["9" * 4000, "9" * 4000 + "GiB", 10**100, f"{2**63}", "8388608TiB"])
def test_a_size_that_no_machine_has(size):
    with pytest.raises(
        InputError, match=r"^staging: .* is more than any machine has: a size is below 9223372036854775808"
    ):
        parse_bytes(size, "staging")
