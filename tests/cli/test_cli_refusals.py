"""What the user gave and cannot work: exit code 2, one message with where, what and what to do, nothing written."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from absent import run_without
from cli_runs import Command, Run, tells

COMMANDS = pytest.mark.parametrize("name", ["plan", "load"])


# -- the method and its configuration ----------------------------------------------------------------------------------


@COMMANDS
@pytest.mark.parametrize(
    ("quant", "pattern"),
    [
        ("nf5", r"^quantization_config: 'nf5' is no known quantization\. Did you mean 'nf4'.*Known names: none, nf4, "),
        ("NF4-DQ", r"^quantization_config: 'NF4-DQ' is no known quantization\. Did you mean 'nf4-dq'"),
        ("zzz", r"^quantization_config: 'zzz' is no known quantization\. Known names: none, "),
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
        "unknown-short-name", "short-name-in-capitals", "nothing-near", "unknown-method", "kind-not-said",
        "exclusive-options", "unknown-field", "value-not-allowed", "broken-json", "missing-json-file",
        "skip-pattern-matches-nothing", "layers-beyond-the-model",
    ],
)  # fmt: skip
def test_configuration_that_cannot_be(quant: str, pattern: str, name: str, kjv_tiny: str, refused: Command) -> None:
    tells(refused(name, kjv_tiny, "--quant", quant), pattern)


@COMMANDS
@pytest.mark.parametrize("found", [{}, {"bitsandbytes": "0.40.0"}], ids=["missing", "too-old"])
def test_package_of_the_method_is_missing(
    found: dict[str, str], name: str, kjv_tiny: str, refused: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distquant.runtime.measure.packages", lambda: found)
    what = r"bitsandbytes 0\.40\.0" if found else "bitsandbytes is not installed"
    pattern = rf"^environment: {what}, bitsandbytes_4bit needs 0\.46\.1 or newer\. Run: pip install 'bitsandbytes>="
    tells(refused(name, kjv_tiny, "--quant", "nf4"), pattern)


@pytest.fixture(scope="module")
def without_extras(kjv_tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Commands, run by an interpreter that has neither bitsandbytes nor ray nor peft."""
    calls = {
        "plan": ["plan", kjv_tiny, "--quant", "nf4"],
        "load": ["load", kjv_tiny, "--quant", "int8"],
        "ray": ["load", kjv_tiny, "--runtime", "ray"],
        "doctor": ["doctor"],
        "none": ["load", kjv_tiny, "--quant", "none"],
    }
    code = f"""
import contextlib, io, json
from distquant.cli.main import main
done = {{}}
for name, arguments in {calls!r}.items():
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        done[name] = main(arguments), out, err
print(json.dumps({{name: [code, out.getvalue(), err.getvalue()] for name, (code, out, err) in done.items()}}))
"""
    folder = tmp_path_factory.mktemp("absent") / "packages"
    done = run_without(("bitsandbytes", "ray", "peft"), folder, code)
    assert done.returncode == 0, done.stderr
    return {name: Run(*found) for name, found in json.loads(done.stdout).items()}


@COMMANDS
def test_package_of_the_method_is_really_missing(name: str, without_extras: dict[str, Run]) -> None:
    pattern = r"^environment: bitsandbytes is not installed, bitsandbytes_[48]bit needs .*Run: pip install 'bits"
    tells(without_extras[name], pattern)


def test_ray_is_really_missing(without_extras: dict[str, Run]) -> None:
    tells(without_extras["ray"], r"^--runtime ray: ray cannot be imported .*\. Run: pip install 'ray>=")


def test_without_extras_none_loads(without_extras: dict[str, Run]) -> None:
    assert without_extras["none"].code == 0
    assert "fingerprint" in without_extras["none"].out


def test_without_extras_doctor_tells_what_is_missing(without_extras: dict[str, Run]) -> None:
    done = without_extras["doctor"]
    assert done.code == 0
    assert re.search(r"^bitsandbytes +missing$", done.out, re.MULTILINE)
    assert re.search(r"^bitsandbytes_4bit .*bitsandbytes is not installed, .*pip install", done.out, re.MULTILINE)
    assert re.search(r"^none +none +ready$", done.out, re.MULTILINE)
    assert "without ray, --runtime ray is not available" in done.out


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


@COMMANDS
def test_dequantizing_is_not_supported_yet(name: str, llama_nf4: str, refused: Command) -> None:
    pattern = (
        r"^quantization_config\.dequantize: loading a 'bitsandbytes' checkpoint as bfloat16 is not supported yet\."
    )
    tells(refused(name, llama_nf4, "--quant", '{"dequantize": true}'), pattern)


@pytest.mark.parametrize("quant", [None, "nf4", '{"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}'])
def test_checkpoint_quantized_as_asked_for_is_loaded(quant: str | None, llama_nf4: str, command: Command) -> None:
    done = command("plan", llama_nf4, *(["--quant", quant] if quant else []))
    assert done.code == 0
    assert "as the checkpoint stores it" in done.out


@COMMANDS
def test_method_of_the_checkpoint_is_not_supported(name: str, kjv_tiny: str, tmp_path: Path, refused: Command) -> None:
    folder = Path(shutil.copytree(kjv_tiny, tmp_path / "bitnet"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitnet"}}))
    message = r"^quantization_config\.quant_method: 'bitnet' is not supported\. .*Known methods: none"
    tells(refused(name, folder), message)


# -- mesh, memory, devices ---------------------------------------------------------------------------------------------


@COMMANDS
@pytest.mark.parametrize("mesh", ["pt=2", "tp=0", "tp", "tp=2,tp=2", "2"])
def test_mesh_that_is_none(mesh: str, name: str, kjv_tiny: str, refused: Command) -> None:
    pattern = rf"^mesh: '.+' in '{mesh}' is no axis=size.*\. Write it as 'tp=2' or 'dp=2,tp=4'; axes are dp, ep, tp"
    tells(refused(name, kjv_tiny, "--mesh", mesh), pattern)


@COMMANDS
def test_experts_axis_for_a_model_without_experts(name: str, kjv_tiny: str, refused: Command) -> None:
    tells(refused(name, kjv_tiny, "--mesh", "ep=2"), r"^mesh: ep=2, and LlamaForCausalLM has no experts\. Use tp")


def test_mesh_of_many_ranks_in_one_process(kjv_tiny: str, refused: Command) -> None:
    pattern = r"^mesh: tp=2 needs 2 ranks, and the runtime 'local' is one process\. Use --runtime torchrun or"
    tells(refused("load", kjv_tiny, "--mesh", "tp=2", "--runtime", "local"), pattern)


@COMMANDS
def test_model_without_a_parallel_plan(name: str, gpt2: str, refused: Command) -> None:
    pattern = r"^mesh: GPT2LMHeadModel has no tensor-parallel plan, tp=2 needs one\. Use tp=1, or device_map='auto'"
    tells(refused(name, gpt2, "--mesh", "tp=2"), pattern)


@COMMANDS
def test_too_little_memory(name: str, kjv_tiny: str, refused: Command) -> None:
    done = refused(name, kjv_tiny, "--quant", "nf4", "--max-memory", "1MiB", "--staging", "4MiB")
    pattern = (
        r"^rank 0: needs 432\.00 KiB quantized \+ 1\.00 MiB unquantized \+ 4\.00 MiB staging = 5\.42 MiB, "
        r"and 921\.60 KiB of 1\.00 MiB \(max_memory\) may be used\. Use more ranks"
    )
    tells(done, pattern)


def test_too_little_memory_on_many_ranks(kjv_tiny: str, refused: Command) -> None:
    done = refused("load", kjv_tiny, "--max-memory", "1MiB", "--mesh", "tp=2")
    tells(done, r"^rank \d \(and 1 more\): needs 0 B quantized \+ 1\.25 MiB unquantized \+ 512\.00 MiB staging = ")


@pytest.mark.parametrize("memory", ["1MiB", '{"cpu": "1MiB"}'])
def test_too_little_memory_on_a_device(memory: str, kjv_tiny: str, refused: Command) -> None:
    done = refused("load", kjv_tiny, "--max-memory", memory, "--device-map", "cpu")
    tells(done, r"^device_map: cpu: its modules take 2\.50 MiB, max_memory allows 1\.00 MiB\. Move modules to another")


@COMMANDS
@pytest.mark.parametrize(
    ("device_map", "pattern"),
    [
        (
            "atuo",
            r"^device_map: 'atuo' \(for the whole model\) is no device\. Give 'auto', 'cpu', 'disk', or the number",
        ),
        ('{"": "cpu", "lm_head": "meta"}', r"^device_map: 'meta' \(for lm_head\) is no device\. Give 'auto'"),
        ('{"": "cpu", "lm_haed": "cpu"}', r"^device_map: 'lm_haed' names no module of LlamaForCausalLM\. Remove or"),
        ('{"model": "cpu"}', r"^device_map: .*does not give any device .*lm_head\.weight\. Give every module a device"),
        ('{"model": ', r"^device_map: is no JSON \(.*\)\. Write it as"),
    ],
    ids=["no-device", "meta", "no-module", "incomplete", "no-json"],
)
def test_device_map_that_cannot_be(device_map: str, pattern: str, name: str, kjv_tiny: str, refused: Command) -> None:
    tells(refused(name, kjv_tiny, "--device-map", device_map), pattern)


def test_device_that_this_machine_lacks(kjv_tiny: str, refused: Command) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("it has one")
    pattern = r"^device_map: 'cuda:0' is given, and the devices here are of type 'cpu'\. Map the modules to devices"
    tells(refused("load", kjv_tiny, "--device-map", "0"), pattern)


@COMMANDS
def test_device_map_beside_a_mesh(name: str, kjv_tiny: str, refused: Command) -> None:
    done = refused(name, kjv_tiny, "--device-map", "cpu", "--mesh", "tp=2")
    tells(
        done, r"^device_map: given together with mesh tp=2 \(2 ranks\)\. Use a mesh to cut the model, or a device_map"
    )


@COMMANDS
def test_memory_of_devices_without_a_device_map(name: str, kjv_tiny: str, refused: Command) -> None:
    done = refused(name, kjv_tiny, "--max-memory", '{"0": "1GiB"}')
    tells(
        done, r"^max_memory: sizes of 0 are given without a device_map\. Give one size for every rank, or device_map="
    )


# -- all at once -------------------------------------------------------------------------------------------------------


@COMMANDS
def test_all_problems_are_in_one_message(name: str, kjv_tiny: str, tmp_path: Path, refused: Command) -> None:
    folder = Path(shutil.copytree(kjv_tiny, tmp_path / "spoiled"))
    (folder / "model-00002-of-00003.safetensors").unlink()
    os.truncate(folder / "model-00003-of-00003.safetensors", 4)
    wrong = ["--mesh", "pt=2", "--quant", "nf5", "--staging", "much", "--max-memory", "lots", "--dtype", "int3"]
    done = refused(name, folder, *wrong)
    assert done.code == 2
    assert done.message.startswith("7 problems:")
    expected = ["mesh", "staging", "dtype", "max_memory", "quantization_config", "model-00002", "model-00003"]
    assert sorted(map(str, expected)) == sorted(
        next(word for word in expected if problem.startswith(word)) for problem in done.problems
    )


@COMMANDS
def test_problems_of_model_and_method_are_told_together(
    name: str, gpt2: str, refused: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distquant.runtime.measure.packages", dict)
    quant = '{"load_in_4bit": true, "llm_int8_skip_modules": ["lm_haed"]}'
    done = refused(name, gpt2, "--mesh", "tp=2", "--quant", quant)
    assert done.code == 2
    assert [problem.split(":")[0] for problem in done.problems] == ["skipped modules", "environment", "mesh"]


def test_a_guess_after_a_typo_adds_no_problem(kjv_tiny: str, refused: Command) -> None:
    """A mesh that cannot be read is planned on as one rank: that this would be too big for memory is no problem."""
    done = refused("plan", kjv_tiny, "--mesh", "pt=8", "--max-memory", "514MiB", "--staging", "512MiB")
    tells(done, r"^mesh: 'pt=8'")


def test_mesh_that_fits_no_runtime_is_told_with_the_rest(kjv_tiny: str, refused: Command) -> None:
    done = refused("load", kjv_tiny, "--mesh", "tp=2", "--runtime", "local", "--quant", "nf5", "--prompt", "")
    assert [problem.split(":")[0] for problem in done.problems] == ["mesh", "--prompt", "quantization_config"]


# -- what the command line itself takes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ([], "arguments are required: COMMAND"),
        (["laod", "x"], "invalid choice: 'laod'"),
        (["load"], "arguments are required: model"),
        (["load", "x", "--quantt", "nf4"], "unrecognized arguments: --quantt nf4"),
        (["load", "x", "--qua", "nf4"], "unrecognized arguments: --qua nf4"),
        (["load", "x", "--runtime", "mpi"], "argument --runtime: invalid choice: 'mpi'"),
        (["load", "x", "--max-new-tokens", "0"], "argument --max-new-tokens: '0' is no int of at least 1"),
        (["load", "x", "--threads", "-2"], "argument --threads: '-2' is no int of at least 1"),
        (["load", "x", "--timeout", "nan"], "argument --timeout: 'nan' is no float of at least 0.1"),
        (["perplexity", "x"], "arguments are required: --text"),
        (["perplexity", "x", "--text", "y", "--window", "1"], "argument --window: '1' is no int of at least 2"),
        (["verify", "x"], "arguments are required: --mesh"),
    ],
    ids=lambda value: "_".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_arguments_that_cannot_be(arguments: list[str], pattern: str, command: Command, workdir: Path) -> None:
    done = command(*arguments)
    assert done.code == 2
    assert re.search(re.escape(pattern) + r".*\. See 'distquant.* --help'\.$", done.message)
    assert list(workdir.iterdir()) == []


def test_verify_with_one_mesh(kjv_tiny: str, refused: Command) -> None:
    tells(
        refused("verify", kjv_tiny, "--mesh", "tp=1"),
        r"^--mesh: one mesh has nothing to be compared with\. Give --mesh",
    )


def test_verify_under_a_launcher(kjv_tiny: str, refused: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = refused("verify", kjv_tiny, "--mesh", "tp=2", "--mesh", "tp=2")
    tells(
        done, r"^verify: verify starts the ranks of each mesh itself, and this is rank 0 .*\. Run it without a launcher"
    )


def test_text_file_is_missing(kjv_tiny: str, refused: Command) -> None:
    done = refused("perplexity", kjv_tiny, "--text", "nowhere.txt")
    tells(done, r"^--text: nowhere\.txt cannot be read \(.*No such file.*\)\. Give a UTF-8 text file")


def test_text_is_no_utf8(kjv_tiny: str, refused: Command, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    done = refused("perplexity", kjv_tiny, "--text", tmp_path / "latin.txt")
    tells(done, r"^--text: .*latin\.txt cannot be read \('utf-8' codec .*\)\. Give a UTF-8 text file")


def test_text_is_empty(kjv_tiny: str, refused: Command, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    done = refused("perplexity", kjv_tiny, "--text", tmp_path / "empty.txt")
    tells(done, r"^--text: has 0 tokens, 2 are needed\. Give a longer text")


def test_prompt_is_empty(kjv_tiny: str, refused: Command) -> None:
    tells(refused("load", kjv_tiny, "--prompt", ""), r"^--prompt: has 0 tokens, 1 are needed\. Give a longer text")


def test_prompt_for_a_checkpoint_without_tokenizer(model_of, refused: Command) -> None:
    done = refused("load", model_of("llama-gqa"), "--prompt", "In the beginning")
    tells(done, r"^--prompt: transformers can load no tokenizer from /.*\. Put the model's tokenizer\.json there")


@pytest.mark.parametrize(("name", "option"), [("plan", "--json"), ("load", "--report")])
def test_output_that_cannot_be_written_is_told_before_the_work(
    name: str, option: str, kjv_tiny: str, command: Command, workdir: Path
) -> None:
    tells(command(name, kjv_tiny, option, "nowhere/out.json"), rf"^{option}: there is no folder .*nowhere\. Create it")
    tells(command(name, kjv_tiny, option, workdir), rf"^{option}: .* is a folder\. Give the name of a file")


@pytest.mark.parametrize(
    ("option", "value", "pattern"),
    [
        ("--capability", "9", r"^--capability: '9' is no compute capability\. Write it as 9\.0"),
        ("--dtype", "int8", r"^dtype: 'int8' is no dtype to load in\. Use bfloat16, float16, float32 or auto"),
        ("--staging", "much", r"^staging: 'much' is no size\. Write it as 24GiB, 512MiB"),
        ("--max-memory", "24 gigs", r"^max_memory: '24 gigs' is no size\. Write it as 24GiB"),
        ("--revision", "v1", r"^revision: 'v1' was given for the folder .*, which has none\. Leave the revision out"),
    ],
)
def test_option_that_cannot_be(option: str, value: str, pattern: str, kjv_tiny: str, refused: Command) -> None:
    tells(refused("plan", kjv_tiny, option, value), pattern)


# -- code that comes with a checkpoint ---------------------------------------------------------------------------------


@pytest.fixture
def with_code(model_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama of a type of its own, with the code for it; running that code leaves a mark."""
    folder = Path(shutil.copytree(model_of("llama-gqa"), tmp_path / "with_code"))
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "code.MyConfig", "AutoModelForCausalLM": "code.MyLlama"}
    config.update(model_type="my_llama", architectures=["MyLlama"], auto_map=code)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"""
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({str(tmp_path / "mark")!r}).touch()

class MyConfig(LlamaConfig):
    model_type = "my_llama"

class MyLlama(LlamaForCausalLM):
    config_class = MyConfig
""")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


@COMMANDS
def test_code_of_a_checkpoint_is_not_run_unasked(name: str, with_code: Path, tmp_path: Path, refused: Command) -> None:
    tells(refused(name, with_code), r"with_code: .*custom code.*\. Read the model's code, .*\(--trust-remote-code\)")
    assert not (tmp_path / "mark").exists()


def test_code_of_a_checkpoint_is_run_when_asked_for(with_code: Path, tmp_path: Path, command: Command) -> None:
    done = command("load", with_code, "--trust-remote-code", "--quant", "nf4")
    assert done.code == 0
    assert "fingerprint" in done.out
    assert (tmp_path / "mark").exists()
