"""Which linears GPTQ and its kin quantize: those inside the blocks, and the output head only where a config says so."""

from __future__ import annotations

import re
from collections.abc import Iterable

from distquant.config.selection import layer_of
from distquant.skeleton.words import Skeleton


def in_blocks(skeleton: Skeleton, blocks: Iterable[str] | None = None) -> list[str]:
    """Linears inside of blocks: of the named module lists, or of any that numbers its members.

    What transformers never quantizes (tied weights, the output head) is left out.
    """
    names = [name for name in skeleton.linears if name not in skeleton.default_skip]
    if blocks is None:
        return [name for name in names if layer_of(name) is not None]
    return [name for name in names if any(name == block or name.startswith(f"{block}.") for block in blocks)]


def compiles(pattern: str) -> str | None:
    """Why a pattern is no regular expression; None where it is one."""
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return None
