"""Writes the golden checkpoints of GPTQ, AWQ and AutoRound beside this file: `python tests/data/make_gptq.py`.

They are packed bit by bit from the formats' definitions (`tests/packed_words.py`): GPTQModel and AutoAWQ, which write
such files, need a GPU. One tiny Llama each, with random codes, zero points and scales.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from packed_words import Kind, rewrite_packed  # noqa: E402
from small_llama import only_needed, small_llama  # noqa: E402

GOLDEN = {
    "gptq/v1-4bit": Kind(group=16),
    "gptq/v2-3bit-act-order": Kind(bits=3, group=32, v1=False, act_order=True),
    "awq/gemm": Kind(method="awq", group=16),
    "auto_round/auto_gptq": Kind(
        method="auto-round",
        packing="auto_round:auto_gptq",
        index=False,
        own={"mlp.down_proj": {"bits": 8, "group_size": 16}},
    ),
}


def write(folder: Path, kind: Kind) -> None:
    """One checkpoint."""
    shutil.rmtree(folder, ignore_errors=True)
    small_llama(torch.float16).save_pretrained(folder)
    only_needed(folder)
    rewrite_packed(folder, kind)


if __name__ == "__main__":
    for name, kind in GOLDEN.items():
        write(HERE / name, kind)
