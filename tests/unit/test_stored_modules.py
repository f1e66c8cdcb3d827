"""The files of a quantized checkpoint say which modules are quantized; its config may name them as other tools do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from field import (
    Writer,
    autofp8,
    by_module,
    float8_rows,
    fp8_tiles,
    int4_groups,
    int8_rows,
    nf4,
    packed,
    write_checkpoint,
)
from models import SMALL, save_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import distquant as dq


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    save_model("qwen3-head-norms", folder)
    return folder


def group(weights: dict[str, Any], file_format: str, targets: tuple[str, ...] = ("Linear",)) -> dict[str, Any]:
    return {"targets": list(targets), "weights": weights, "format": file_format}


W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
FP8_ROW = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
OUT_OF = "model.layers.1.self_attn.o_proj"
BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BNB8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_gptq"}
ONE = torch.ones(())
TORCHAO = {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"group_size": None}}}

METHODS: dict[str, tuple[Writer, dict[str, Any]]] = {
    "gptq": (packed(), {**GPTQ, "dynamic": {rf"-:{OUT_OF}": {}}}),
    "awq": (packed(method="awq"), {**AWQ, "modules_to_not_convert": ["lm_head", OUT_OF]}),
    "auto-round": (packed(), {**AUTO_ROUND, "extra_config": {OUT_OF: {"bits": 16}}}),
    "ct-int4": (
        int4_groups,
        {**CT, "config_groups": {"g": group(W4, "pack-quantized")}, "ignore": ["lm_head", OUT_OF]},
    ),
    "ct-fp8": (
        float8_rows,
        {**CT, "config_groups": {"g": group(FP8_ROW, "float-quantized")}, "ignore": ["lm_head", OUT_OF]},
    ),
    "bnb-4bit": (nf4, {**BNB4, "llm_int8_skip_modules": ["lm_head", OUT_OF]}),
    "bnb-8bit": (int8_rows("weight", "SCB", 127.0), {**BNB8, "llm_int8_skip_modules": ["lm_head", OUT_OF]}),
    "fp8": (fp8_tiles, {"quant_method": "fp8", "modules_to_not_convert": ["lm_head", OUT_OF]}),
    "fbgemm": (float8_rows, {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head", OUT_OF]}),
    "quanto": (
        int8_rows("weight._data", "weight._scale", 1.0, input_scale=ONE, output_scale=ONE),
        {"quant_method": "quanto", "weights": "int8", "modules_to_not_convert": ["lm_head", OUT_OF]},
    ),
    "torchao": (
        int8_rows("_weight_qdata", "_weight_scale", 1.0),
        {"quant_method": "torchao", "quant_type": TORCHAO, "modules_to_not_convert": ["lm_head", OUT_OF]},
    ),
}


def check_values(folder: Path, means: dict[str, Tensor]) -> None:
    """Compares the weights as a load dequantizes them with what they mean; bfloat16 has eight bits."""
    state = dq.load(folder, quantization_config={"dequantize": True}).state_dict()
    for name, value in means.items():
        torch.testing.assert_close(state[name].float(), value, rtol=2**-7, atol=2**-9)


def converted(folder: Path) -> set[str]:
    return set(dq.plan(folder).converted)


def in_layers(choose: Callable[[str], bool]) -> Callable[[str], bool]:
    return lambda module: ".layers." in module and choose(module)


@pytest.mark.parametrize("method", METHODS)
def test_the_files_decide_and_a_disagreement_is_a_note(dense: Path, tmp_path: Path, method: str) -> None:
    writer, config = METHODS[method]
    # Stored plain: the config has it quantized. Stored quantized: the config leaves it out (`OUT_OF`).
    stored = in_layers(lambda module: "layers.0.mlp" not in module)
    means = write_checkpoint(dense, tmp_path, writer, stored, config)
    plan = dq.plan(tmp_path)
    names = {name.removesuffix(".weight") for name in means}
    assert set(plan.converted) == {name for name in names if stored(name)}
    assert OUT_OF in plan.converted
    notes = "\n".join(plan.notes)
    assert f"stored quantized, though the config leaves them out: 1 linear modules ({OUT_OF}); the files" in notes
    plain = "model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj, model.layers.0.mlp.down_proj"
    assert f"stored unquantized, though the config has them quantized: 3 linear modules ({plain}); the files" in notes
    check_values(tmp_path, means)


WRAPPED = "model.language_model.layers.0.mlp"
LISTS: dict[str, dict[str, Any]] = {
    "gptq": {**GPTQ, "dynamic": {r"-:^model\.language_model\.layers\.0\.mlp\..*": {}}},
    "gptq-blocks": {**GPTQ, "block_name_to_quantize": "model.language_model.layers,model.visual.blocks"},
    "awq": {**AWQ, "modules_to_not_convert": ["lm_head", "visual", "language_model.model.layers.0.mlp"]},
    "awq-parts": {**AWQ, "modules_to_not_convert": ["lm_head", "layers.0.mlp."]},
    "auto-round": {
        **AUTO_ROUND,
        "block_name_to_quantize": ["model.language_model.layers"],
        "extra_config": {f"{WRAPPED}.{name}_proj": {"bits": 16} for name in ("gate", "up", "down")},
    },
    "ct-int4": {
        **CT,
        "config_groups": {"g": group(W4, "pack-quantized")},
        "ignore": ["lm_head", "re:.*visual.*", *(f"{WRAPPED}.{name}_proj" for name in ("gate", "up", "down"))],
    },
    "ct-targets": {
        **CT,
        "config_groups": {"g": group(W4, "pack-quantized", (r"re:^language_model\.model\.layers\..*(attn|1\.mlp).*",))},
        "ignore": ["language_model.lm_head"],
    },
    "bnb-4bit": {**BNB4, "llm_int8_skip_modules": ["lm_head", "vision_tower", "language_model.model.layers.0.mlp"]},
    "bnb-8bit": {**BNB8, "llm_int8_skip_modules": ["lm_head", "text_model.layers.0.mlp"]},
    "fp8": {"quant_method": "fp8", "ignored_layers": ["lm_head", WRAPPED, "model.visual.merger"]},
    "fbgemm": {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head", WRAPPED]},
}
WRITERS = {"gptq-blocks": "gptq", "awq-parts": "awq", "ct-targets": "ct-int4"}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_may_be_in_names_of_a_model_around_it(dense: Path, tmp_path: Path, kind: str) -> None:
    """transformers issue 48349, vLLM issue 54547, llm-compressor issues 2482 and 2842, unsloth issue 4208."""
    writer, _ = METHODS[WRITERS.get(kind, kind)]
    every = "blocks" in kind
    means = write_checkpoint(
        dense, tmp_path, writer, in_layers(lambda module: every or "layers.0.mlp" not in module), LISTS[kind]
    )
    notes = dq.plan(tmp_path).notes
    assert not [note for note in notes if "though" in note]
    check_values(tmp_path, means)


RULES: dict[str, tuple[Callable[[str], Writer], dict[str, Any]]] = {
    "gptq": (
        by_module(lambda module: packed(bits=8 if "down_proj" in module else 4)),
        {**GPTQ, "dynamic": {r"+:^model\.language_model\.layers\.\d+\.mlp\.down_proj$": {"bits": 8, "provider": "x"}}},
    ),
    "gptq-excluding": (
        by_module(lambda module: packed(bits=8 if "self_attn" in module else 4)),
        {**GPTQ, "dynamic": {r"^(?!.*language_model.*mlp).*$": {"bits": 8}}},
    ),
    "auto-round": (
        by_module(lambda module: packed(bits=8 if module.endswith("0.mlp.down_proj") else 4)),
        {**AUTO_ROUND, "extra_config": {"language_model.model.layers.0.mlp.down_proj": {"bits": 8}}},
    ),
    "ct": (
        by_module(lambda module: float8_rows if "self_attn" in module else int4_groups),
        {
            **CT,
            "format": "mixed-precision",
            "config_groups": {
                "a": group(FP8_ROW, "float-quantized", (r"re:^model\.language_model\.layers\.\d+\.self_attn.*",)),
                "b": group(W4, "pack-quantized", (r"re:^model\.language_model\.layers\.\d+\.mlp.*",)),
            },
        },
    ),
}


@pytest.mark.parametrize("kind", RULES)
def test_rules_that_say_how_a_module_is_stored_know_these_names_too(dense: Path, tmp_path: Path, kind: str) -> None:
    writer, config = RULES[kind]
    means = write_checkpoint(dense, tmp_path, writer, in_layers(lambda _: True), config)
    assert len(converted(tmp_path)) == 14
    check_values(tmp_path, means)


def test_names_of_the_files_count_where_the_model_has_others(tmp_path: Path) -> None:
    """Gemma 3 as transformers 4 saved it: files and lists say `language_model.model`, the model says otherwise."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {**SMALL, "head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32}
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "vision_use_head": False}
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=119)
    )
    model.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    kept = load_file(tmp_path / "dense" / "model.safetensors")

    def old(name: str) -> str:
        return name.replace("model.language_model.", "language_model.model.").removeprefix("model.")

    save_file({old(name): value.clone() for name, value in kept.items()}, tmp_path / "dense" / "model.safetensors")
    skipped = "language_model.model.layers.0.mlp"
    config = {"quant_method": "fp8", "modules_to_not_convert": [skipped, "vision_tower", "multi_modal_projector"]}
    stored: Callable[[str], bool] = lambda module: module.startswith("language_model") and skipped not in module  # noqa: E731
    write_checkpoint(tmp_path / "dense", tmp_path / "fp8", fp8_tiles, stored, config)
    plan = dq.plan(tmp_path / "fp8")
    assert len(plan.converted) == 11
    assert all(name.startswith("model.language_model.layers.") for name in plan.converted)
    assert not [note for note in plan.notes if "though" in note]


def test_a_list_that_the_user_gives_is_a_request(dense: Path, tmp_path: Path) -> None:
    write_checkpoint(dense, tmp_path, fp8_tiles, in_layers(lambda _: True), {"quant_method": "fp8"})
    asked = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head", "down_proj"]}
    with pytest.raises(dq.InputError, match=r"down_proj\.weight: is stored quantized \(weight_scale_inv\)"):
        dq.plan(tmp_path, quantization_config=asked)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("static", [True, False])
def test_autofp8_has_one_scale_and_no_tile(dense: Path, tmp_path: Path, shape: tuple[int, ...], static: bool) -> None:
    """vLLM pull request 4332: `weight_scale` where transformers writes `weight_scale_inv`."""
    scheme = "static" if static else "dynamic"
    config = {"quant_method": "fp8", "activation_scheme": scheme, "ignored_layers": ["lm_head"]}
    means = write_checkpoint(dense, tmp_path, autofp8(shape, static=static), in_layers(lambda _: True), config)
    assert dq.plan(tmp_path).quantization_config["weight_block_size"] is None
    check_values(tmp_path, means)


def test_weight_scale_may_have_tiles_too(dense: Path, tmp_path: Path) -> None:
    def renamed(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        stored, value = fp8_tiles(weight)
        return {"weight": stored["weight"], "weight_scale": stored["weight_scale_inv"]}, value

    config = {"quant_method": "fp8", "fmt": "float8_e4m3fn", "weight_block_size": [128, 128]}
    means = write_checkpoint(dense, tmp_path, renamed, in_layers(lambda _: True), config)
    check_values(tmp_path, means)


def test_what_is_saved_names_the_modules_that_were_left_alone(dense: Path, tmp_path: Path) -> None:
    stored = in_layers(lambda module: "layers.0.mlp" not in module)
    config = {"quant_method": "fp8", "provider": "a tool", "modules_to_not_convert": ["lm_head", WRAPPED]}
    write_checkpoint(dense, tmp_path / "fp8", fp8_tiles, stored, config)
    dq.load(tmp_path / "fp8").save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert written["provider"] == "a tool"
    assert set(written["modules_to_not_convert"]) >= {"lm_head", "model.layers.0.mlp.up_proj"}
    assert dq.plan(tmp_path / "again").converted == dq.plan(tmp_path / "fp8").converted


# -- components that are missing, and forms that are not supported ----------------------------------------------------


def without(folder: Path, suffix: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({n: v for n, v in tensors.items() if not n.endswith(suffix)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("method", "suffix", "lacks"),
    [
        ("bnb-4bit", ".absmax", "absmax"),
        ("gptq", ".qzeros", "qzeros"),
        ("ct-int4", ".weight_scale", "weight_scale"),
        ("fp8", ".weight_scale_inv", "weight_scale_inv"),
        ("torchao", "_weight_scale", "_weight_scale"),
    ],
)
def test_a_component_that_all_weights_lack_is_one_message(
    dense: Path, tmp_path: Path, method: str, suffix: str, lacks: str
) -> None:
    writer, config = METHODS[method]
    write_checkpoint(dense, tmp_path, writer, in_layers(lambda _: True), config)
    without(tmp_path, suffix)
    with pytest.raises(dq.InputError) as caught:
        dq.plan(tmp_path)
    (problem,) = caught.value.problems
    assert problem.what.startswith(f"the checkpoint lacks {lacks} of this quantized weight (and 13 more alike: model.")


REFUSED: dict[str, tuple[Writer, dict[str, Any], str]] = {
    "nvfp4": (
        lambda weight: (
            {
                "weight_packed": torch.zeros(len(weight), weight.shape[1] // 2, dtype=torch.uint8),
                "weight_scale": torch.ones(len(weight), weight.shape[1] // 16).to(torch.float8_e4m3fn),
                "weight_global_scale": torch.ones(1),
            },
            weight,
        ),
        {
            **CT,
            "format": "nvfp4-pack-quantized",
            "config_groups": {
                "g": group(
                    NVFP4,
                    "nvfp4-pack-quantized",
                )
            },
        },
        "'nvfp4-pack-quantized' is not supported",
    ),
    "marlin": (
        lambda weight: ({"B": torch.zeros(8, 8, dtype=torch.int32), "s": torch.ones(4)}, weight),
        {**GPTQ, "checkpoint_format": "marlin"},
        "'marlin' is one kernel's own order of bytes",
    ),
    "awq-gemv": (
        lambda weight: ({"qweight": torch.zeros(8, 8, dtype=torch.int32), "scales": torch.ones(4)}, weight),
        {**AWQ, "version": "gemv"},
        "'gemv' is another kernel's layout",
    ),
    "sparse": (
        lambda weight: ({"weight.compressed": torch.zeros(8), "weight.bitmask": torch.zeros(8)}, weight),
        {**CT, "config_groups": {"g": group(W4, "pack-quantized")}, "sparsity_config": {"format": "sparse-bitmask"}},
        "sparse weights are not supported",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_form_that_is_not_supported_is_the_only_message(dense: Path, tmp_path: Path, kind: str) -> None:
    writer, config, fault = REFUSED[kind]
    write_checkpoint(dense, tmp_path, writer, in_layers(lambda _: True), config)
    with pytest.raises(dq.InputError) as caught:
        dq.plan(tmp_path)
    (problem,) = caught.value.problems
    assert fault in problem.what


# -- biases ------------------------------------------------------------------------------------------------------------


def bias_of(module: str, dense: Path, value: float) -> dict[str, Tensor]:
    rows = load_file(dense / "model.safetensors")[f"{module}.weight"].shape[0]
    bias = torch.full((rows,), -0.0, dtype=torch.float16)
    bias[-1] = value
    return {f"{module}.bias": bias}


@pytest.mark.parametrize("method", ["gptq", "awq", "ct-int4"])
@pytest.mark.parametrize("module", ["model.layers.1.mlp.down_proj", "model.norm"])
def test_biases_that_are_not_zero_are_refused(dense: Path, tmp_path: Path, method: str, module: str) -> None:
    """optimum pull request 1827, AutoGPTQ issue 555: most files have zeros there, and some have corrections."""
    writer, config = METHODS[method]
    zeros, ones = (bias_of(module, dense, value) for value in (0.0, 1e-4))
    write_checkpoint(dense, tmp_path, writer, in_layers(lambda _: True), config, more=zeros)
    model = dq.load(tmp_path)
    note = f"assumed: 1 biases that are dropped are zero, which a load checks ({module}.bias)"
    assert note in model.distquant.plan.notes
    write_checkpoint(dense, tmp_path, writer, in_layers(lambda _: True), config, more=ones)
    with pytest.raises(dq.InputError, match=rf"{module}\.bias: this bias of the checkpoint is not zero"):
        dq.load(tmp_path)


# -- messages on the page ----------------------------------------------------------------------------------------------

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "errors.md").read_text(encoding="utf-8")


def test_messages_on_the_page_are_real(dense: Path, tmp_path: Path) -> None:
    every = in_layers(lambda _: True)
    write_checkpoint(dense, tmp_path / "nf4", nf4, every, BNB4)
    without(tmp_path / "nf4", ".absmax")
    write_checkpoint(dense, tmp_path / "rotated", packed(), every, {**GPTQ, "rotation": "hadamard"})
    groups = {"group_0": group(NVFP4, "nvfp4-pack-quantized")}
    write_checkpoint(dense, tmp_path / "nvfp4", int4_groups, every, {**CT, "config_groups": groups})
    for folder in ("nf4", "rotated", "nvfp4"):
        with pytest.raises(dq.InputError) as caught:
            dq.plan(tmp_path / folder)
        assert f"distquant: {caught.value}\n" in PAGE


def test_the_message_about_biases_on_the_page_is_real(dense: Path, tmp_path: Path) -> None:
    modules = [f"model.layers.{layer}.{name}" for layer in range(2) for name in LINEARS]
    biases = {name: value for module in modules for name, value in bias_of(module, dense, 1.0).items()}
    write_checkpoint(dense, tmp_path, packed(), in_layers(lambda _: True), GPTQ, more=biases)
    with pytest.raises(dq.InputError) as caught:
        dq.load(tmp_path)
    assert f"distquant: {caught.value}\n".replace("Qwen3ForCausalLM", "LlamaForCausalLM") in PAGE


LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
