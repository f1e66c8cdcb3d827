"""A first load: one process, 4-bit weights, an answer, and the fingerprint of the bits.

Run it with `python examples/first_load.py [MODEL]`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoTokenizer

import distquant as dq

path = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "models" / "kjv-tiny")

model = dq.load(path, quantization_config="nf4-dq")

tokenizer = AutoTokenizer.from_pretrained(path)
inputs = tokenizer("In the beginning", return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))

report = model.distquant.report
print(f"\n{report.bytes_read:,} bytes read, {report.quantized_bytes:,} bytes of quantized weights")
print(f"a projection is now a {type(model.model.layers[0].mlp.up_proj).__name__}")
print(f"fingerprint {dq.fingerprint(model)}")
