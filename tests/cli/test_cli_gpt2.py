"""A model that cannot be cut, and whose weights are stored `[in, out]` (Conv1D), on one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import Command

import distquant as dq

FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}

KINDS: dict[str, dict[str, Any]] = {
    "nf4": FOUR,
    "nf4-dq": {**FOUR, "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def upstream(folder: str, quant: str) -> Any:
    """The model as transformers loads it, in float32, without bitsandbytes' repacking of weights on the CPU."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(**KINDS[quant]) if quant in KINDS else None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the mean of all absmax depends on the number
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    finally:
        torch.set_num_threads(threads)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


@pytest.mark.parametrize("quant", ["none", "nf4", "nf4-dq", "int8"])
def test_one_rank_has_the_bits_of_transformers(quant: str, gpt2: str) -> None:
    ours = dq.load(gpt2, quantization_config=KINDS.get(quant, quant), dtype="float32")
    theirs = upstream(gpt2, quant)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    for name, value in other.items():
        assert torch.equal(mine[name], value), name
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        a, b = ours(ids).logits, theirs(ids).logits
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert type(ours.transformer.h[0].attn.c_attn) is type(theirs.transformer.h[0].attn.c_attn)


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_one_rank_by_the_command_line(quant: str, gpt2: str, command: Command, workdir: Path) -> None:
    assert command("load", gpt2, "--quant", quant, "--mesh", "tp=1", "--report", "report.json").code == 0
    report = json.loads((workdir / "report.json").read_text())
    assert report["fingerprint"] == dq.fingerprint(dq.load(gpt2, quantization_config=quant))
    assert (report["ranks"][0]["quantized_bytes"] > 0) == (quant != "none")
