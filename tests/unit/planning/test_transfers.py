"""The reads that the plan sums are those that a load makes, byte for byte."""

from __future__ import annotations

import pytest

from distquant.checkpoint import TensorInfo
from distquant.config.resolve import parse
from distquant.model.description import Source
from distquant.planning import TensorPlan, even_partition
from distquant.planning.read_assignment import bytes_read, reads_of_node
from distquant.planning.row_map import RowMap
from distquant.planning.transfers import transfers_of
from distquant.quantization import config_classes, scheme_for
from distquant.sharding.mesh import Mesh

ITEM = {"BF16": 2, "F32": 4}
ROWS, WIDTH = 3000, 512


def infos_of(*dtypes: str) -> dict[str, TensorInfo]:
    """One tensor of `ROWS` rows after the other, in one file."""
    found, offset = {}, 0
    for number, dtype in enumerate(dtypes):
        nbytes = ROWS * WIDTH * ITEM[dtype]
        found[f"t{number}"] = TensorInfo(
            name=f"t{number}", dtype=dtype, shape=(ROWS, WIDTH), file="f", offset=offset, nbytes=nbytes
        )
        offset += nbytes
    return found


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("dtypes", [("BF16", "BF16"), ("BF16", "F32"), ("F32", "BF16", "BF16")])
@pytest.mark.parametrize(("mesh", "dim"), [(Mesh(dp=2), None), (Mesh(tp=2), 0), (Mesh(dp=2, tp=2), 1)])
def test_planned_bytes_are_those_of_the_ranges_that_are_read(mesh, dim, dtypes, quant):
    infos = infos_of(*dtypes)
    sources = tuple(Source(name, offset=(number * ROWS, 0)) for number, name in enumerate(infos))
    shape = (ROWS * len(dtypes), WIDTH)
    config = parse(quant, config_classes())
    assert config is not None
    scheme = scheme_for(config)
    partitions = {"p": even_partition(shape[dim], 64, mesh.tp)} if dim is not None else {}
    tensor = TensorPlan("a.weight", shape, "bfloat16", scheme.name, sources, dim, "p" if partitions else None)
    nodes = (0,) * mesh.size
    transfers = list(transfers_of([tensor], partitions, scheme, False, infos))
    read = [0] * mesh.size
    for assigned in reads_of_node(transfers, mesh, tuple(range(mesh.size))):
        rows = RowMap(shape, assigned.transfer.sources, infos)
        for item in assigned.reads:
            nbytes = sum(each.nbytes for each in rows.ranges(item.rows, assigned.columns))
            assert item.nbytes == nbytes
            read[item.reader] += nbytes
    assert bytes_read(transfers, mesh, nodes) == read
    assert sum(read) == sum(info.nbytes for info in infos.values())
    assert sum(nbytes > 0 for nbytes in read) > 1, "one rank reads all of it, so nothing is divided"
