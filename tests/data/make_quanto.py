"""Writes tests/data/quanto: small llamas that optimum-quanto quantized and saved, on the CPU.

    python tests/data/make_quanto.py

Written by optimum-quanto 0.2.7 (transformers 5.23.0 refuses to save its models); nothing of distquant is used. The
inner size is 160, so that groups of 4 bits are 32 inputs wide in one projection and whole rows in the others.
"""

from __future__ import annotations

from pathlib import Path

from optimum.quanto import QuantizedModelForCausalLM, qfloat8, qint2, qint4, qint8
from small_llama import only_needed, small_llama

KINDS = {"int8": qint8, "float8": qfloat8, "int4": qint4, "int2": qint2}


def main() -> None:
    root = Path(__file__).parent / "quanto"
    for name, kind in KINDS.items():
        llama = small_llama(intermediate_size=160, initializer_range=0.1)
        model = QuantizedModelForCausalLM.quantize(llama, weights=kind, exclude="lm_head")
        model.save_pretrained(root / name)
        only_needed(root / name)


if __name__ == "__main__":
    main()
