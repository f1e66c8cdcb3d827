"""Checkpoints in the words of other tools have one fingerprint at every width: all ranks know all names of a module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import work
from field import Stored, Writer, autofp8, by_module, float8_rows, int4_groups, packed, write_checkpoint
from ranks import RankFailed
from torch import Tensor



GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "provider": "a tool", "method": "gptq"}
ROWS = {"num_bits": 8, "type": "float", "strategy": "channel"}
GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
SELF_ATTN, MLP = (rf"re:^model\.language_model\.layers\.\d+\.{part}.*" for part in ("self_attn", "mlp"))

CASES: dict[str, tuple[Writer | Callable[[str], Writer], dict[str, object]]] = {
    "gptq": (
        by_module(lambda module: packed(bits=8 if "down_proj" in module else 4)),
        {**GPTQ, "dynamic": {r"+:^model\.language_model\.layers\.\d+\.mlp\.down_proj$": {"bits": 8}}},
    ),
    "compressed-tensors": (
        by_module(lambda module: float8_rows if "self_attn" in module else int4_groups),
        {
            "quant_method": "compressed-tensors",
            "format": "mixed-precision",
            "config_groups": {
                "a": {"targets": [SELF_ATTN], "weights": ROWS, "format": "float-quantized", "note": "x"},
                "b": {"targets": [MLP], "weights": GROUPS, "format": "pack-quantized"},
            },
            "ignore": ["re:.*layers.1.mlp.*"],
        },
    ),
    "autofp8": (autofp8((1,)), {"quant_method": "fp8", "activation_scheme": "static"}),
}


@pytest.mark.parametrize("case", CASES)
def test_one_fingerprint_at_two_widths(ranks, model_of, tmp_path: Path, case: str) -> None:
    writer, config = CASES[case]
    dense = Path(model_of("qwen3-head-norms"))
    write_checkpoint(dense, tmp_path, writer, lambda module: "layers.0.mlp.up" not in module, config)
    truth = work.fingerprint(str(tmp_path), None)
    assert ranks.run(2, work.fingerprint, str(tmp_path), None, "tp=2") == [truth] * 2


def test_a_bias_that_is_not_zero_stops_all_ranks(ranks, model_of, tmp_path: Path) -> None:
    def with_bias(weight: Tensor) -> Stored:
        stored, value = packed()(weight)
        return {**stored, "bias": torch.ones(len(weight))}, value

    write_checkpoint(Path(model_of("qwen3-head-norms")), tmp_path, with_bias, lambda _: True, {**GPTQ})
    with pytest.raises(RankFailed, match=r"down_proj\.bias: this bias of the checkpoint is not zero \(nor are 13 more"):
        ranks.run(2, work.fingerprint, str(tmp_path), None, "tp=2")
