"""Writes `tests/data/gguf/tiny.gguf`: a tiny random llama in several types, written by the package gguf 0.19.

python tests/data/make_gguf.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

KINDS = {
    "ffn_down": "Q8_0", "ffn_up": "Q5_0", "attn_v": "F16", "attn_k": "BF16", "attn_output": "Q6_K",
    "token_embd": "Q4_0", "weight": "Q4_K",
}  # fmt: skip


def main() -> None:
    import ggufs
    import models

    small = {"hidden_size": 256, "intermediate_size": 64, "vocab_size": 128, "num_attention_heads": 8}
    models.FAMILIES["golden"] = ("llama", {**small, "num_key_value_heads": 4, "num_hidden_layers": 1})
    (FOLDER / "gguf").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        source = models.save_model("golden", Path(folder) / "model")
        ggufs.write_gguf(source, FOLDER / "gguf" / "tiny.gguf", KINDS)


if __name__ == "__main__":
    main()
