"""Checkpoints whose files, names or configs are not as transformers writes them: read right, or refused with advice.

Each is of a kind that public reports tell of; where there is one, it is named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from field import autofp8, packed, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

import distquant as dq

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"

Copy = Callable[[str], Path]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, rename: Callable[[str], str]) -> None:
    save_file({rename(name): value for name, value in tensors_of(folder).items()}, folder / "model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes fields of config.json; None removes one."""
    document = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in document.items() if v is not None}))


def shard(folder: Path, listed: dict[str, str | None] | None = None, **more: dict[str, Tensor]) -> dict[str, Tensor]:
    """Divides a checkpoint into two files and an index; `listed` changes entries, `more` adds tensors to a file."""
    tensors = tensors_of(folder)
    names = list(tensors)
    files = {FIRST: names[: len(names) // 2], SECOND: names[len(names) // 2 :]}
    weight_map = {name: file for file, held in files.items() for name in held} | (listed or {})
    for file, key in ((FIRST, "first"), (SECOND, "second")):
        save_file({name: tensors[name] for name in files[file]} | more.get(key, {}), folder / file)
    (folder / "model.safetensors").unlink()
    kept = {name: file for name, file in weight_map.items() if file is not None}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": kept}))
    return tensors


def refused(folder: Path, **options: Any) -> str:
    """The message of a checkpoint that has one cause, told once."""
    with pytest.raises(dq.InputError) as caught:
        dq.plan(folder, **options)
    assert len(caught.value.problems) == 1, str(caught.value)
    message = str(caught.value)
    assert "damaged" not in message or "in no file" in message or "is missing in" in message
    return message


class TestIndex:
    """The index decides: vllm-project/vllm#54230, osaurus-ai/vmlx-swift#388, NVIDIA/Model-Optimizer#2427."""

    def test_a_tensor_that_it_does_not_list(self, copy_of: Copy, model_of) -> None:
        folder = copy_of("llama-gqa")
        shard(folder, second={"mtp.fc.weight": torch.zeros(8, 8)})
        model = dq.load(folder)
        assert dq.fingerprint(model) == dq.fingerprint(dq.load(model_of("llama-gqa")))
        assert [note for note in model.distquant.plan.notes if note.startswith("ignored: 1 tensor that")]

    def test_an_old_copy_in_another_file(self, copy_of: Copy, model_of) -> None:
        folder = copy_of("llama-gqa")
        name = "model.embed_tokens.weight"
        stale = torch.zeros_like(tensors_of(folder)[name])
        first = list(tensors_of(folder)).index(name) < len(tensors_of(folder)) // 2
        shard(folder, **{"second" if first else "first": {name: stale}})
        model = dq.load(folder)
        assert dq.fingerprint(model) == dq.fingerprint(dq.load(model_of("llama-gqa")))
        assert any(note.startswith("stored twice: 1 tensor") for note in model.distquant.plan.notes)

    def test_a_listed_tensor_that_the_model_does_not_need(self, copy_of: Copy) -> None:
        folder = copy_of("llama-tied")
        shard(folder, {"model.layers.9.mtp.weight": SECOND, "lm_head.weight": FIRST})
        notes = dq.load(folder).distquant.plan.notes
        assert any(note.startswith("not there: 2 tensors that the index lists") for note in notes)

    def test_a_missing_file_that_the_model_does_not_need(self, copy_of: Copy) -> None:
        folder = copy_of("llama-gqa")
        shard(folder, {"mtp.fc.weight": "mtp.safetensors"})
        assert any("not there: 1 tensors" in note for note in dq.load(folder).distquant.plan.notes)

    def test_a_listed_tensor_that_the_model_needs(self, copy_of: Copy) -> None:
        folder = copy_of("llama-gqa")
        save_file(
            {n: t for n, t in tensors_of(folder).items() if "layers.1.mlp" not in n}, folder / "model.safetensors"
        )
        shard(folder, {f"model.layers.1.mlp.{kind}_proj.weight": SECOND for kind in ("gate", "up", "down")})
        message = refused(folder)
        assert "is in no file, though" in message and "model.layers.1.mlp" in message and "2 more alike" in message

    def test_a_missing_file_that_the_model_needs(self, copy_of: Copy) -> None:
        folder = copy_of("llama-gqa")
        shard(folder)
        (folder / SECOND).unlink()
        message = refused(folder)
        assert message.startswith(f"{SECOND}: is missing in") and "download or copy it again" in message

    def test_tensors_of_the_model_that_it_does_not_list(self, copy_of: Copy) -> None:
        folder = copy_of("llama-gqa")
        shard(folder, {"model.norm.weight": None})
        assert "model.norm.weight: 1 parameter is in files whose index does not list them" in refused(folder)

    def test_a_single_file_that_hides_it(self, copy_of: Copy) -> None:
        """Blaizzy/mlx-vlm#1464."""
        folder = copy_of("llama-gqa")
        tensors = shard(folder)
        save_file({name: tensors[name] for name in list(tensors)[:5]}, folder / "model.safetensors")
        message = refused(folder)
        assert "16 parameters are not in model.safetensors, which comes before the index" in message
        assert "Remove or rename model.safetensors" in message
        save_file(tensors, folder / "model.safetensors")
        assert any(note.startswith(f"not read: {INDEX}") for note in dq.plan(folder).notes)

    def test_no_index(self, copy_of: Copy, model_of) -> None:
        folder = copy_of("llama-gqa")
        shard(folder)
        (folder / INDEX).unlink()
        model = dq.load(folder)
        assert dq.fingerprint(model) == dq.fingerprint(dq.load(model_of("llama-gqa")))
        assert any(note.startswith("read without an index: 2 shards") for note in model.distquant.plan.notes)


def inside_layers(part: str) -> Callable[[str], str]:
    return lambda name: name.replace("model.layers.0.", f"model.layers.0.{part}").replace(
        "layers.1.", f"layers.1.{part}"
    )


@pytest.mark.parametrize(
    ("rename", "count", "says"),
    [
        (lambda name: f"_orig_mod.{name}", 21, r"names of torch\.compile .*model\._orig_mod"),
        (lambda name: f"module.{name}", 21, "names of DistributedDataParallel or DeepSpeed"),
        (lambda name: f"module._orig_mod.{name}", 21, "names of .*torch.compile"),
        (inside_layers("_orig_mod."), 18, "names of torch.compile"),
        (inside_layers("_checkpoint_wrapped_module."), 18, "names of FSDP"),
        (lambda name: f"base_model.model.{name}", 21, r"names of PEFT .*merge_and_unload"),
        (lambda name: name.replace("q_proj.", "q_proj.base_layer."), 2, r"names of PEFT .*merge_and_unload"),
        (lambda name: f"policy.backbone.{name}", 21, r"begin with 'policy\.backbone\.'"),
    ],
)  # fmt: skip
def test_names_of_a_wrapper(copy_of: Copy, rename, count, says) -> None:
    """FareedKhan-dev/train-llm-from-scratch#37; huggingface/peft#1453."""
    folder = copy_of("llama-gqa")
    rewrite(folder, rename)
    message = refused(folder)
    assert f"{count} parameters are stored under names" in message
    assert re.search(says, message), message


class TestMissing:
    def test_many_of_one_cause_are_one_problem(self, copy_of: Copy) -> None:
        folder = copy_of("llama-gqa")
        save_file(
            {n: t for n, t in tensors_of(folder).items() if not n.endswith("_proj.weight")},
            folder / "model.safetensors",
        )
        message = refused(folder)
        assert "the checkpoint has no tensor for it (shape [" in message and "nor for 13 more parameters (" in message

    def test_an_output_head_that_is_not_tied(self, copy_of: Copy) -> None:
        folder = copy_of("llama-tied")
        edit_config(folder, tie_word_embeddings=False)
        message = refused(folder)
        assert message.startswith("lm_head.weight: ") and 'set "tie_word_embeddings": true in config.json' in message

    def test_quantized_weights_without_a_config(self, copy_of: Copy, tmp_path: Path) -> None:
        folder = tmp_path / "quantized"
        write_checkpoint(copy_of("llama-gqa"), folder, packed(), lambda name: "lm_head" not in name, {})
        edit_config(folder, quantization_config=None)
        message = refused(folder)
        assert "14 weights are stored quantized (" in message and "qweight" in message
        assert "config.json has no quantization_config" in message


class TestDtype:
    """huggingface/transformers#34919, #34743: a config.json that names no dtype means that of the tensors."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_of_the_tensors(self, copy_of: Copy, dtype) -> None:
        folder = copy_of("llama-gqa")
        edit_config(folder, dtype=None, torch_dtype=None)
        save_file({n: t.to(dtype) for n, t in tensors_of(folder).items()}, folder / "model.safetensors")
        assert dq.plan(folder).dtype == str(dtype).removeprefix("torch.") == theirs(folder)

    def test_of_mixed_tensors(self, copy_of: Copy) -> None:
        folder = copy_of("llama-gqa")
        edit_config(folder, dtype=None, torch_dtype=None)
        tensors = tensors_of(folder)
        for name, dtype in (("lm_head.weight", torch.float32), ("model.norm.weight", torch.float32)):
            save_file(
                {n: t.to(dtype if n == name else t.dtype) for n, t in tensors.items()}, folder / "model.safetensors"
            )
            assert dq.plan(folder).dtype == theirs(folder)

    def test_of_mixed_files(self, copy_of: Copy) -> None:
        folder = copy_of("llama-gqa")
        edit_config(folder, dtype=None, torch_dtype=None)
        shard(folder)
        save_file({n: t.float() for n, t in load_file(folder / SECOND).items()}, folder / SECOND)
        assert dq.plan(folder).dtype == "bfloat16" == theirs(folder)

    def test_of_float8_codes(self, copy_of: Copy, tmp_path: Path) -> None:
        folder = tmp_path / "fp8"
        config = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
        write_checkpoint(copy_of("llama-gqa"), folder, autofp8((1,)), lambda name: "lm_head" not in name, config)
        edit_config(folder, dtype=None, torch_dtype=None)
        assert dq.plan(folder).dtype == "bfloat16"

    def test_the_config_comes_first(self, copy_of: Copy) -> None:
        folder = copy_of("llama-gqa")
        edit_config(folder, dtype="float16", torch_dtype=None)
        assert dq.plan(folder).dtype == "float16"


def theirs(folder: Path) -> str:
    """The dtype that transformers loads."""
    from transformers import AutoModelForCausalLM

    return str(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype).removeprefix("torch.")
