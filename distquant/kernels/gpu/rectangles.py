"""Programs that each take a rectangle of a matrix: for work in which every element is by itself.

Rows and columns keep apart until addresses are made of them, so that no element costs a division: of the place in the
matrix by its columns, or of the column by the width of a tile.
"""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

from distquant.kernels.gpu.launch import power

PER_PROGRAM = 2048
"""Elements of a rectangle: 16 for each thread, whose addresses all fit into registers."""
WIDEST = 512
"""Columns of a rectangle at most."""


@triton.jit
def rectangle(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's rows (int64 `[ROWS, 1]`), columns (int32 `[1, COLUMNS]`), and the mask of those that there are."""
    across = tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0)
    row = (program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = program % across * COLUMNS + tl.arange(0, COLUMNS)
    return row[:, None], column[None, :], (row < rows)[:, None] & (column < columns)[None, :]


def covering(rows: int, columns: int) -> tuple[tuple[int], dict[str, int]]:
    """Returns the grid of programs that cover a matrix, and the sizes that each is compiled for."""
    width = min(power(columns), WIDEST)
    height = PER_PROGRAM // width
    return (-(-rows // height) * -(-columns // width),), {"ROWS": height, "COLUMNS": width}
