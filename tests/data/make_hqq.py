"""Writes `tests/data/hqq/`: a tiny random llama whose projections hqq 0.2.8 quantized and stored.

    python tests/data/make_hqq.py

Codes, scales, zeros and all that is beside them are what `HQQLinear.state_dict` gives; the configuration is the dict of
transformers' `HqqConfig`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from hqq.core.quantize import HQQLinear
from safetensors.torch import load_file, save_file
from transformers import HqqConfig

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

KINDS = {
    "4-bits": {"nbits": 4, "group_size": 64, "axis": 1},
    "2-bits-strided": {"nbits": 2, "group_size": 16, "axis": 0},
}
SMALL = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}


def main() -> None:
    import models

    models.FAMILIES["golden"] = ("llama", {**SMALL, "vocab_size": 128})
    torch.set_num_threads(1)
    for kind, fields in KINDS.items():
        folder = models.save_model("golden", FOLDER / "hqq" / kind)
        config = HqqConfig(**fields)
        tensors = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            if not name.endswith("_proj.weight"):
                tensors[name] = tensor
                continue
            linear = torch.nn.Linear(*tensor.shape[::-1], bias=False)
            linear.weight = torch.nn.Parameter(tensor, requires_grad=False)
            state = HQQLinear(linear, config.quant_config, compute_dtype=tensor.dtype, device="cpu").state_dict()
            prefix = name.removesuffix("weight")
            tensors |= {prefix + key: torch.as_tensor(value).contiguous() for key, value in state.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        described = json.loads((folder / "config.json").read_text())
        written = {"quant_config": config.quant_config, "quant_method": "hqq", "skip_modules": config.skip_modules}
        (folder / "config.json").write_text(json.dumps(described | {"quantization_config": written}, indent=2))


if __name__ == "__main__":
    main()
