"""The README's bits of each method are those of its scheme, and its figures those of the pages that they link to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distquant.config import parse
from distquant.quantization import config_classes, scheme_for
from distquant.sharding.shard import Shard

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLE = README[README.index("| name | for | bits |") :].partition("\n\n")[0].splitlines()[2:]
ROWS = {cells[0].strip("`"): cells[1:] for cells in ([c.strip() for c in row.strip("|").split("|")] for row in TABLE)}

SIZE = 4096
"""Inputs and outputs of the weight that the bits are of, as in models of 7 billion parameters."""


def bits(name: str) -> float:
    """Bits of an element of a large weight, scales and zero points included."""
    config = parse(name, config_classes())
    assert config is not None
    shard = Shard("model.layers.0.mlp.up_proj.weight", (SIZE, SIZE), "bfloat16")
    return scheme_for(config).shard_nbytes(shard) * 8 / SIZE**2


@pytest.mark.parametrize("name", ROWS)
def test_bits_are_those_of_the_scheme(name: str) -> None:
    assert ROWS[name][1] == f"{bits(name):.2f}"


ITEMS = [item for item in re.split(r"\n(?=- |\n)", README) if "(benchmarks/results/" in item]


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.strip("- \n")[:30])
def test_figures_are_on_the_page_that_they_link_to(item: str) -> None:
    """Compares all numbers with a fraction, rounded as the README rounds them."""
    page = "".join(
        (ROOT / path).read_text(encoding="utf-8") for path in re.findall(r"\((benchmarks/results/[^)]+)\)", item)
    )
    there = [float(number) for number in re.findall(r"\d+\.\d+", page)]
    prose = re.sub(r"\]\([^)]*\)", "", item)
    missing = [
        n for n in re.findall(r"\d+\.\d+", prose) if float(n) not in {round(x, len(n.partition(".")[2])) for x in there}
    ]
    assert missing == []
    assert re.search(r"\d+\.\d+", prose)
