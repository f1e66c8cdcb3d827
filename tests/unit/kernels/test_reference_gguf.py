"""Our GGUF arithmetic against the package gguf, bit for bit, on random bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from distquant.checkpoint.gguf import BLOCKS
from distquant.kernels.reference.gguf import dequantize_gguf


def random_words(kind: str, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows of valid blocks: any bytes, but where a float must be finite."""
    block, nbytes = BLOCKS[kind]
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 256, (rows, columns // block, nbytes), generator=generator, dtype=torch.uint8)
    floats = {"Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2)}.get(kind, (0,))
    wide = {"F32": torch.float32, "BF16": torch.bfloat16}.get(kind, torch.float16)
    for at in floats:
        values = torch.randn(rows, columns // block, generator=generator).to(wide)
        words[:, :, at : at + wide.itemsize] = values.unsqueeze(2).view(torch.uint8)
    return words.view(rows, -1)


@pytest.mark.parametrize("kind", BLOCKS)
def test_values_are_those_of_gguf(kind):
    words = random_words(kind, 17, 512)
    theirs = quants.dequantize(words.numpy(), GGMLQuantizationType[kind]).astype(np.float32)
    ours = dequantize_gguf(words, kind, 512)
    assert ours.dtype == torch.float32
    assert np.array_equal(ours.numpy().view(np.int32), theirs.reshape(17, 512).view(np.int32))


@pytest.mark.parametrize("kind", BLOCKS)
def test_dequantizing_slices_is_slicing_what_was_dequantized(kind):
    block, nbytes = BLOCKS[kind]
    words = random_words(kind, 6, 1024)
    whole = dequantize_gguf(words, kind, 1024)
    partition = 256 // block * nbytes
    assert torch.equal(dequantize_gguf(words[2:5, partition : 3 * partition], kind, 512), whole[2:5, 256:768])
