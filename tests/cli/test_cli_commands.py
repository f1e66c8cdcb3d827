"""What each command does when everything is right."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cli_runs import Command

import distquant as dq
from distquant.loading.report import STAGES

REPORT = {
    "fingerprint", "plan_digest", "runtime", "mesh", "quantization_config", "world_size", "seconds",
    "checkpoint_bytes", "model_bytes", "ranks",
}  # fmt: skip
"""The keys that the design promises; exactly these."""

RANK = {
    "rank", "seconds", "bytes_read", "bytes_sent", "bytes_received", "quantized_bytes", "peak_rss_bytes",
    "peak_device_bytes", "stages",
}  # fmt: skip
"""The keys of one rank that the design promises."""

MORE_OF_RANK = {
    "unquantized_bytes", "staging_bytes", "direct_bytes", "mapped_bytes", "retries", "kernel", "forward", "limit",
    "devices", "load_buffer",
}  # fmt: skip
"""What each rank tells beyond them."""


def row(text: str, first: str) -> list[str]:
    """The cells of the table row that begins with a word."""
    rows = [re.split(r" {2,}", line.strip()) for line in text.splitlines()]
    (found,) = [cells for cells in rows if cells[0] == first and len(cells) > 1]
    return found


def weight_bytes(folder: str) -> int:
    from distquant.checkpoint import open_checkpoint

    return open_checkpoint(folder).total_bytes


# -- plan --------------------------------------------------------------------------------------------------------------


def test_plan_shows_ranks_and_rules(kjv_tiny: str, command: Command) -> None:
    done = command("plan", kjv_tiny, "--quant", "nf4-dq", "--mesh", "tp=2", "--staging", "8MiB")
    assert (done.code, done.err) == (0, "")
    assert re.search(r"quantization bitsandbytes from bfloat16, mesh tp=2 \(2 ranks\), plan [0-9a-f]{16}", done.out)
    head = row(done.out, "rank")
    sizes = ["quantized", "unquantized", "loading", "KV cache", "activations", "needs"]
    assert head == ["rank", "parameters", "to read", *sizes]
    assert [line.split()[0] for line in done.out.splitlines()[:3]] == ["weights", "generation", "fits"]
    assert row(done.out, "0")[:6] == ["0", "656,512", "1.28 MiB", "204.11 KiB", "514.25 KiB", "8.05 MiB"]
    assert row(done.out, "1")[:6] == ["1", "656,512", "1.22 MiB", "216.00 KiB", "514.25 KiB", "8.05 MiB"]
    assert "rank 1: query heads 2-3, kv heads 1" in done.out
    down = row(done.out, "model.layers.*.mlp.down_proj")
    assert down[1:4] == ["rowwise", "rowwise 192+192", "4"]
    assert "multiples of 64" in down[4]
    assert "over the vocabulary" in row(done.out, "lm_head")[4]
    assert re.search(r"^note: left unquantized: 1 linear modules \(lm_head\)$", done.out, re.MULTILINE)
    assert re.search(r"^note: exact statistics .* cost 23\.91 KiB over all ranks of tp$", done.out, re.MULTILINE)
    assert re.search(r"^checked at load: memory of each rank \(declare it with max_memory\)$", done.out, re.MULTILINE)


def test_plan_as_json_is_a_load_plan_that_loads(kjv_tiny: str, command: Command, workdir: Path) -> None:
    done = command("plan", kjv_tiny, "--quant", "nf4", "--json", "plan.json")
    assert done.code == 0
    plan = dq.LoadPlan.from_json((workdir / "plan.json").read_text())
    assert f"plan {plan.digest[:16]}" in done.out
    assert plan.digest == dq.plan(kjv_tiny, quantization_config="nf4").digest
    assert dq.fingerprint(dq.load(plan)) == dq.fingerprint(dq.load(kjv_tiny, quantization_config="nf4"))


def test_plan_with_memory_declared_leaves_less_to_check(kjv_tiny: str, command: Command) -> None:
    done = command("plan", kjv_tiny, "--mesh", "tp=2", "--max-memory", "1GiB", "--capability", "9.0")
    assert done.code == 0
    assert "checked at load: memory" not in done.out


def test_plan_reads_no_weight(kjv_tiny: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("os.preadv", refuse)
    assert command("plan", kjv_tiny, "--quant", "int8", "--mesh", "tp=3").code == 0


# -- quantization, however it is given ---------------------------------------------------------------------------------


def test_quantization_as_json_text_or_file_is_that_of_the_short_name(
    kjv_tiny: str, command: Command, workdir: Path
) -> None:
    given = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    (workdir / "quant.json").write_text(json.dumps({"quant_method": "bitsandbytes", **given}))
    digests = set()
    for quant in ("nf4", json.dumps(given), "quant.json"):
        assert command("plan", kjv_tiny, "--quant", quant, "--json", "plan.json").code == 0
        digests.add(dq.LoadPlan.from_json((workdir / "plan.json").read_text()).digest)
    assert len(digests) == 1


def test_layers_and_skipped_modules_are_left_alone(kjv_tiny: str, command: Command, workdir: Path) -> None:
    quant = {"load_in_4bit": True, "layers": "1-2", "llm_int8_skip_modules": [".*down_proj", "lm_head"]}
    assert command("plan", kjv_tiny, "--quant", json.dumps(quant), "--json", "plan.json").code == 0
    converted = dq.LoadPlan.from_json((workdir / "plan.json").read_text()).converted
    assert {name.split(".")[2] for name in converted} == {"1", "2"}
    assert {name.split(".")[-1] for name in converted} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
    }  # fmt: skip


# -- load --------------------------------------------------------------------------------------------------------------


def test_load_answers_and_reports(kjv_tiny: str, command: Command, workdir: Path) -> None:
    # Through the page cache: reads past it are of whole blocks, and count more bytes.
    buffered = ("--io", "buffered")
    arguments = ["--prompt", "In the beginning", "--max-new-tokens", "8", "--report", "report.json", *buffered]
    done = command("load", kjv_tiny, "--quant", "nf4", *arguments)
    assert done.code == 0
    report = json.loads((workdir / "report.json").read_text())
    assert report.keys() == REPORT
    (rank,) = report["ranks"]
    assert rank.keys() == RANK | MORE_OF_RANK
    assert tuple(rank["stages"]) == STAGES == ("read", "copy", "quantize", "exchange", "place")
    assert (report["runtime"], report["mesh"], report["world_size"]) == ("local", "tp=1", 1)
    assert report["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert re.fullmatch(r"[0-9a-f]{64}", report["plan_digest"])
    assert rank["bytes_read"] == weight_bytes(kjv_tiny)
    assert rank["quantized_bytes"] == 432 << 10
    assert report["model_bytes"] == rank["quantized_bytes"] + rank["unquantized_bytes"]
    assert report["seconds"] == rank["seconds"] > 0
    assert rank["bytes_sent"] == rank["bytes_received"] == 0
    model = dq.load(kjv_tiny, quantization_config="nf4")
    assert report["fingerprint"] == dq.fingerprint(model)
    from distquant.runtime.answer import generate

    answer = generate(model, "In the beginning", max_new_tokens=8)
    assert done.out.endswith(f"\n\n{answer}\n")
    assert len(answer) > len("In the beginning")
    assert done.err.endswith("note: left unquantized: 1 linear modules (lm_head)\n")
    # What and where, how fast, and the fingerprint.
    told = re.search(r"^loaded (\S+) as nf4: .*; local, mesh tp=1\ntook .*\nfingerprint (\w{32})\n\n", done.out)
    assert told and told.groups() == (kjv_tiny, report["fingerprint"])


def test_load_of_a_prequantized_checkpoint(llama_nf4: str, model_of, command: Command, workdir: Path) -> None:
    found = []
    for folder, quant in ((llama_nf4, []), (model_of("llama-gqa"), ["--quant", "nf4"])):
        assert command("load", folder, *quant, "--report", "report.json").code == 0
        found.append(json.loads((workdir / "report.json").read_text())["fingerprint"])
    assert found[0] == found[1]


# -- verify ------------------------------------------------------------------------------------------------------------


def test_verify_of_equal_bits(kjv_tiny: str, command: Command) -> None:
    done = command("verify", kjv_tiny, "--quant", "nf4-dq", "--mesh", "tp=1", "--mesh", "dp=1")
    assert done.code == 0
    first, second, last = done.out.splitlines()
    assert last == "equal"
    assert first.split()[0] == second.split()[0]
    assert first.endswith("tp=1 (local)")
    assert second.endswith("dp=1 (local)")


def test_verify_of_bits_that_differ(kjv_tiny: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter(["0" * 32, "f" * 32])
    monkeypatch.setattr("distquant.verification.fingerprint.fingerprint", lambda model: next(values))
    done = command("verify", kjv_tiny, "--mesh", "tp=1", "--mesh", "dp=1")
    assert done.code == 1
    assert "equal" not in done.out
    last = done.err.splitlines()[-1]
    assert last.startswith("distquant: the fingerprints differ: ")
    assert f"'tp=1': '{'0' * 32}'" in last
    assert f"'dp=1': '{'f' * 32}'" in last


# -- perplexity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_perplexity_of_a_text(quant: str, kjv_tiny: str, command: Command, workdir: Path) -> None:
    from transformers import AutoTokenizer

    text = (Path(kjv_tiny) / "validation.txt").read_text()[:3000]
    (workdir / "text.txt").write_text(text)
    done = command("perplexity", kjv_tiny, "--text", "text.txt", "--quant", quant, "--window", "64")
    assert done.code == 0
    model = dq.load(kjv_tiny, quantization_config=quant)
    expected = dq.perplexity(model, AutoTokenizer.from_pretrained(kjv_tiny), text, 64)
    assert done.out == f"perplexity {expected:.4f}  fingerprint {dq.fingerprint(model)}\n"
    assert 1 < expected < 100


# -- inspect and doctor ------------------------------------------------------------------------------------------------


def test_inspect_of_a_plain_checkpoint(kjv_tiny: str, command: Command) -> None:
    done = command("inspect", kjv_tiny)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(
        f"LlamaForCausalLM (llama) in {kjv_tiny}\n39 tensors, 1,311,872 elements, 2.50 MiB, 3 files"
    )
    assert row(done.out, "BF16") == ["BF16", "39", "2.50 MiB"]
    assert [row(done.out, f"model-0000{i}-of-00003.safetensors")[1] for i in (1, 2, 3)] == ["13", "20", "6"]
    assert done.out.endswith("\nnot quantized\n")


def test_inspect_of_a_quantized_checkpoint(llama_nf4: str, command: Command) -> None:
    done = command("inspect", llama_nf4)
    assert (done.code, done.err) == (0, "")
    assert row(done.out, "U8")[1] == "28"
    assert "\nquantized:\n" in done.out
    assert "  bnb_4bit_quant_type = 'nf4'\n" in done.out
    assert "  quant_method = 'bitsandbytes'\n" in done.out
    assert row(done.out, "weight")[:3] == ["weight", "bits", "group"]
    assert row(done.out, "nf4")[:5] == ["nf4", "4", "64", "yes", "float32"]


def test_inspect_tells_every_precision(copy_of, command: Command) -> None:
    folder = copy_of("llama-gqa")
    config = json.loads((folder / "config.json").read_text())
    group = {"targets": ["re:.*mlp.*"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}
    other = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "config_groups": {"a": group, "b": other},
        "format": "pack-quantized",
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    done = command("inspect", folder)
    assert done.code == 0
    assert row(done.out, "weight") == ["weight", "bits", "group", "symmetric", "storage dtype", "modules", "excluded"]
    assert row(done.out, "int4") == ["int4", "4", "32", "yes", "int32", "re:.*mlp.*", "lm_head"]
    assert row(done.out, "float8_e4m3fn") == ["float8_e4m3fn", "8", "row", "yes", "-", "Linear", "lm_head"]


def test_inspect_of_a_quantization_that_is_not_understood(copy_of, command: Command) -> None:
    folder = copy_of("llama-gqa")
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq", "bit": 4}}')
    done = command("inspect", folder)
    assert done.code == 0
    assert "  bit = 4\n" in done.out
    assert "not understood: 2 problems:" in done.out
    assert "quantization_config.bits: is missing" in done.out


def test_inspect_of_a_strange_config(kjv_tiny: str, copy_of, command: Command) -> None:
    folder = copy_of("llama-gqa")
    (folder / "config.json").write_text('{"architectures": 5}')
    done = command("inspect", folder)
    assert done.code == 0
    assert done.out.startswith("? (?) in ")


INT8_ROW = ["bitsandbytes_8bit", "int8", "yes", "yes", "yes", "yes", "quantized", "adapters", "ready"]


def test_doctor_tells_what_this_machine_can_run(command: Command) -> None:
    import torch

    done = command("doctor")
    assert (done.code, done.err) == (0, "")
    # Builds for one kind of device say so behind a "+", some only in one of the two places.
    assert [name.partition("+")[0] for name in row(done.out, "torch")] == ["torch", torch.__version__.partition("+")[0]]
    assert row(done.out, "none") == ["none", "none", "no", "yes", "yes", "yes", "plain", "adapters", "ready"]
    assert row(done.out, "bitsandbytes_4bit") == [
        "bitsandbytes_4bit", "nf4, nf4-dq, fp4, fp4-dq", "yes", "yes", "yes", "yes", "quantized", "adapters", "ready"
    ]  # fmt: skip
    assert row(done.out, "bitsandbytes_8bit") == INT8_ROW
    assert re.search(r"^device: (cpu|cuda .*capability)", done.out, re.MULTILINE)


def test_doctor_of_one_method(command: Command) -> None:
    done = command("doctor", "--quant", "int8")
    assert done.code == 0
    assert row(done.out, "bitsandbytes_8bit") == INT8_ROW
    assert "nf4" not in done.out


def test_doctor_knows_every_method_and_says_what_is_missing(command: Command) -> None:
    from distquant.quantization.registry import discover

    done = command("doctor")
    for scheme in discover().values():
        assert re.search(rf"^{re.escape(scheme.name)}  ", done.out, re.MULTILINE)
    assert re.search(r"^aqlm +- +yes +no +no +no +- +as transformers +see below$", done.out, re.MULTILINE)
    assert re.search(r"^compressed-tensors +int4, int4-g64, int4-g32, fp8-row .* ready$", done.out, re.MULTILINE)
    assert "aqlm: aqlm is not installed, aqlm needs it. Run: pip install 'aqlm'" in done.out


def test_doctor_of_an_unknown_method(command: Command) -> None:
    done = command("doctor", "--quant", "int9")
    assert (done.code, done.out) == (2, "")
    assert re.match(r"quantization_config: unknown quantization 'int9'\. Did you mean 'int8'", done.message)


def test_doctor_of_a_method_that_cannot_run(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distquant.runtime.measure.packages", lambda: {"bitsandbytes": "0.40.0"})
    done = command("doctor", "--quant", "nf4")
    assert done.code == 0
    assert "bitsandbytes 0.40.0, bitsandbytes_4bit needs 0.50 or newer. Run: pip install" in done.out


def test_version_and_help(command: Command) -> None:
    assert command("--version").out == f"distquant {dq.__version__}\n"
    done = command("--help")
    assert done.code == 0
    for name in ("plan", "load", "verify", "perplexity", "inspect", "doctor", "demo"):
        assert re.search(rf"^ +{name}\b", done.out, re.MULTILINE)
