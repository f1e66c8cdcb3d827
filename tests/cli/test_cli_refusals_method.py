"""Methods and configurations that cannot be, or that are not what the checkpoint is quantized with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_runs import COMMANDS, Command, tells


@COMMANDS
@pytest.mark.parametrize(
    ("quant", "pattern"),
    [
        ("nf5", r"^quantization_config: unknown quantization 'nf5'\. Did you mean 'nf4'.*Known names: none, nf4, "),
        ("FP16", r"^quantization_config: unknown quantization 'FP16'\. That is a dtype: give dtype='float16'"),
        ("zzz", r"^quantization_config: unknown quantization 'zzz'\. Known names: none, "),
        (
            '{"quant_method": "bitsandbites", "load_in_4bit": true}',
            r"^quantization_config\.quant_method: 'bitsandbites' is not supported\. Did you mean 'bitsandbytes'\?",
        ),
        ('{"quant_method": "bitsandbytes"}', r"does not say which kind is meant\. Add load_in_4bit=True or"),
        (
            '{"load_in_4bit": true, "load_in_8bit": true}',
            r"^quantization_config\.load_in_4bit: load_in_4bit and load_in_8bit exclude each other\. Set only one",
        ),
        (
            '{"load_in_4bit": true, "bnb_4bit_quant_typ": "nf4"}',
            r"^quantization_config\.bnb_4bit_quant_typ: is unknown \(given 'nf4'\)\. Did you mean 'bnb_4bit_quant",
        ),
        (
            '{"load_in_4bit": true, "bnb_4bit_quant_type": "nf3"}',
            r"^quantization_config\.bnb_4bit_quant_type: 'nf3' is not allowed\. Give one of 'fp4', 'nf4'",
        ),
        ('{"load_in_4bit": ', r"^quantization_config: is not JSON \(.*\)\. Give one JSON object"),
        ("nowhere.json", r"^nowhere\.json: cannot be read \(No such file or directory\)\. Give the path of a JSON"),
        (
            '{"load_in_4bit": true, "llm_int8_skip_modules": ["lm_haed"]}',
            r": 'lm_haed' matches no module\. Did you mean 'lm_head'\?",
        ),
        ('{"load_in_8bit": true, "layers": "2-9"}', r"^layers: 2-9 reaches beyond the model\. .* layers are 0 to 3"),
    ],
    ids=[
        "unknown-short-name", "dtype", "nothing-near", "unknown-method", "kind-not-said",
        "exclusive-options", "unknown-field", "value-not-allowed", "broken-json", "missing-json-file",
        "skip-pattern-matches-nothing", "layers-beyond-the-model",
    ],
)  # fmt: skip
def test_configuration_that_cannot_be(quant: str, pattern: str, name: str, kjv_tiny: str, refused: Command) -> None:
    tells(refused(name, kjv_tiny, "--quant", quant), pattern)


@COMMANDS
@pytest.mark.parametrize(
    ("quant", "pattern"),
    [
        ("int8", r"^quantization_config: the checkpoint is quantized with Bnb4bitConfig .*, you gave Bnb8bitConfig "),
        (
            "nf4-dq",
            r"^quantization_config\.bnb_4bit_use_double_quant: the checkpoint has False, you gave True\. Set it",
        ),
        (
            "fp4",
            r"^quantization_config\.bnb_4bit_quant_type: the checkpoint has 'nf4', you gave 'fp4'\. Set it to 'nf4'",
        ),
        ("none", r"^quantization_config: 'none' asks for unquantized weights, but the checkpoint is quantized: "),
    ],
    ids=["int8", "nf4-dq", "fp4", "none"],
)
def test_checkpoint_is_quantized_otherwise(
    quant: str, pattern: str, name: str, llama_nf4: str, refused: Command
) -> None:
    tells(refused(name, llama_nf4, "--quant", quant), pattern + r".*[Ll]eave quantization_config out")


@pytest.mark.parametrize("quant", [None, "nf4", '{"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}'])
def test_checkpoint_quantized_as_asked_for_is_loaded(quant: str | None, llama_nf4: str, command: Command) -> None:
    done = command("plan", llama_nf4, *(["--quant", quant] if quant else []))
    assert done.code == 0
    assert "as the checkpoint stores it" in done.out


def test_products_in_float8_of_other_codes(kjv_tiny: str, refused: Command) -> None:
    tells(
        refused("load", kjv_tiny, "--quant", "nf4", "--forward", "float8"),
        r"^forward: 'float8' is for float8 weights .*; bitsandbytes_4bit as it is configured has none\. "
        r"Take 'auto' or 'dequantize'",
    )


def test_kernel_that_does_not_know_the_method(kjv_tiny: str, refused: Command) -> None:
    tells(
        refused("load", kjv_tiny, "--quant", "quanto-int8", "--kernel", "bitsandbytes"),
        r"^kernel: 'bitsandbytes' has no kernels for quanto\. Take 'auto', 'cpu', 'triton' or 'reference'",
    )


@COMMANDS
def test_method_of_the_checkpoint_is_not_supported(name: str, kjv_tiny: str, tmp_path: Path, refused: Command) -> None:
    folder = Path(shutil.copytree(kjv_tiny, tmp_path / "eights"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "eights"}}))
    message = r"^quantization_config\.quant_method: 'eights' is not supported\. .*Known methods: none"
    tells(refused(name, folder), message)
