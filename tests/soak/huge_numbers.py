"""Numbers without a bound, wherever a user or a checkpoint gives one: `python tests/soak/huge_numbers.py` tries them.

Each trial makes its input in a folder, and plans or runs a command on it. None may take more than a few seconds or more
memory than its files.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trials import Trial, attempt, command, failures, table, warm

MODEL = Path(__file__).resolve().parents[2] / "examples/models/kjv-tiny"

Argv = tuple[str, ...]
Case = tuple[str, str, Callable[[Path], Argv]]
"""Kind, name, and a function that makes the input in an empty folder and returns the command."""

DIGITS = "9" * 5000
"""More digits than Python reads."""

SIZES = ("0", "-1", "1000000000", "99999999999", str(2**63), str(2**64), "1" + "0" * 30, DIGITS)
"""Numbers in the place of a size or a count, as JSON or an option spells them."""

OTHERS = ("true", "1.5", "1e400", "NaN", "Infinity", "-Infinity", "null", '"8"', "[]")
"""What else may stand in the place of a number."""

COUNTS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
"""Fields of a llama that decide the size of its model."""


def copy_model(folder: Path) -> Path:
    """Copies the example without its texts; the files are small."""
    target = folder / "model"
    shutil.copytree(MODEL, target, ignore=shutil.ignore_patterns("*.txt"))
    return target


def with_config(text_of: Callable[[dict[str, Any]], str]) -> Callable[[Path], Argv]:
    """Returns a case that plans the example with another config.json."""

    def make(folder: Path) -> Argv:
        model = copy_model(folder)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(text_of(config))
        return "plan", str(model)

    return make


def with_field(name: str, number: str, **others: Any) -> Callable[[Path], Argv]:
    """Returns such a case for one field, which may be dotted; the number is written as it is."""

    def text_of(config: dict[str, Any]) -> str:
        config |= others
        owner, parts = config, name.split(".")
        for part in parts[:-1]:
            owner = owner.setdefault(part, {})
        owner[parts[-1]] = "@number@"
        return json.dumps(config).replace('"@number@"', number)

    return with_config(text_of)


def configs() -> Iterator[Case]:
    for field in COUNTS:
        for number in SIZES:
            yield "config.json, sizes", f"{field}={number[:24]}", with_field(field, number)
    for field in ("num_hidden_layers", "hidden_size"):
        for other in OTHERS:
            yield "config.json, no size", f"{field}={other}", with_field(field, other)
    for number in ("1000000000", "1" + "0" * 15, DIGITS, "-5", "NaN"):
        for field in ("sliding_window", "max_window_layers", "initializer_range", "rms_norm_eps", "pretraining_tp"):
            yield "config.json, others", f"{field}={number[:24]}", with_field(field, number, model_type="qwen2")
        for field in ("rope_parameters.rope_theta", "rope_parameters.factor"):
            rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
            yield "config.json, rope", f"{field}={number[:24]}", with_field(field, number, rope_parameters=rope)
    for number in ("Infinity", "-Infinity", "0", "1e308", "1e400"):
        for kind in ("linear", "dynamic", "yarn"):
            rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 512}
            make = with_field("rope_parameters.factor", number, rope_parameters=rope)
            yield "config.json, rope", f"{kind} factor={number}", make
    experts = {
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "decoder_sparse_step": 1, "architectures": ["Qwen3MoeForCausalLM"],
    }  # fmt: skip
    for field in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"):
        for number in ("0", "-1", "1000000000", str(2**63), DIGITS):
            yield "config.json, experts", f"{field}={number[:24]}", with_field(field, number, **experts)
    for kind in ("qwen3", "gemma2", "gemma3_text", "mixtral", "gpt_neox", "gpt2", "mpt", "bloom", "deepseek_v3"):
        for field in ("num_hidden_layers", "n_layer", "n_layers"):
            yield "config.json, layers", f"{kind} {field}", with_field(field, "1000000000", model_type=kind)
    for kind in ("mpt", "bloom", "gpt2", "gptj", "opt", "codegen", "falcon"):
        for field in (
            "max_position_embeddings",
            "n_positions",
            "max_seq_len",
            "n_ctx",
            "n_head",
            "num_attention_heads",
        ):
            make = with_field(field, "1000000000000000", model_type=kind)
            yield "config.json, tables", f"{kind} {field}", make
    for name, inner in (("lists", "[" * 100_000), ("objects", '{"a":' * 100_000)):
        yield "JSON, deep", f"config.json of {name}", with_config(lambda config, inner=inner: inner)


def quantizations() -> Iterator[Case]:
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    methods: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
        "gptq": (gptq, ("bits", "group_size", "damp_percent")),
        "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128}, ("bits", "group_size")),
        "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, ("weight_block_size.0",)),
        "bitsandbytes": (
            {"quant_method": "bitsandbytes", "load_in_8bit": True}, ("llm_int8_threshold", "bnb_4bit_blocksize"),
        ),
        "hqq": ({"quant_method": "hqq"}, ("quant_config.weight_quant_params.nbits",)),
    }  # fmt: skip
    for method, (config, fields) in methods.items():
        for field in fields:
            for number in ("0", "-1", "1000000000", str(2**64), DIGITS, "true", "NaN", "1e400"):
                text = _with(config, field, number)
                yield "quantization_config", f"{method} {field}={number[:24]}", with_field("quantization_config", text)
                yield "--quant", f"{method} {field}={number[:24]}", asked(text)
    for layers in ("0-99999999999", DIGITS, f"0-{DIGITS}", "-", "5-1", "0," * 50_000 + "0"):
        yield "--quant", f"layers={layers[:24]}", asked(json.dumps({"quant_method": "nf4", "layers": layers}))
    for name, text in (("deep", '{"a":' * 100_000), ("digits", '{"a": ' + DIGITS + "}"), ("long", '{"a": "')):
        yield "JSON, deep", f"--quant {name}", asked(text)


def asked(text: str) -> Callable[[Path], Argv]:
    """Returns a case that plans the example with a quantization in a JSON file."""

    def make(folder: Path) -> Argv:
        (folder / "quant.json").write_text(text)
        return "plan", str(MODEL), "--quant", str(folder / "quant.json")

    return make


def _with(config: dict[str, Any], field: str, number: str) -> str:
    made = json.loads(json.dumps(config))
    owner: Any = made
    *path, last = field.split(".")
    for part in path:
        owner = owner.setdefault(part, {}) if isinstance(owner, dict) else owner[int(part)]
    owner[int(last) if isinstance(owner, list) else last] = "@number@"
    return json.dumps(made).replace('"@number@"', number)


OPTIONS = {
    "--mesh": ("tp={}", "{}"), "--tp": ("{}",), "--dp": ("{}",), "--ranks-per-node": ("{}",), "--context": ("{}",),
    "--batch": ("{}",), "--staging": ("{}", "{}B", "{}GiB"), "--max-memory": ("{}", "{}B", "{}GiB", '{{"0": {}}}'),
    "--device-map": ('{{"": {}}}', "{}"), "--capability": ("{}.0",),
}  # fmt: skip
"""Options of `plan`, and how each takes a number."""


def options() -> Iterator[Case]:
    for option, spellings in OPTIONS.items():
        for spelling in spellings:
            for number in (*SIZES, "nan", "inf", "1e400", "1"):
                text = spelling.format(number)
                name = f"{option} {text if len(text) < 30 else text[:24] + '...'}"
                yield "options of plan", name, lambda folder, o=option, t=text: ("plan", str(MODEL), f"{o}={t}")
    for number in ("0", "-1", "inf", "nan", "1e300", "1e-300", DIGITS):
        yield "options of load", f"--timeout {number[:24]}", _load("--timeout", number)
    for option in ("--threads", "--max-new-tokens"):
        for number in ("0", "-1", "1000000000", str(2**63), DIGITS, "1.5", "nan"):
            yield "options of load", f"{option} {number[:24]}", _load(option, number)
    for number in ("0", "1000000000", str(2**64), DIGITS):
        text = str(MODEL / "validation.txt")
        argv = ("perplexity", str(MODEL), "--text", text, f"--window={number}")
        yield "options of perplexity", f"--window {number[:24]}", lambda folder, argv=argv: argv


def _load(option: str, number: str) -> Callable[[Path], Argv]:
    prompt = ("--prompt", "In the beginning") if option == "--max-new-tokens" else ()
    return lambda folder: ("load", str(MODEL), *prompt, f"{option}={number}")


def safetensors(entry: str, name: str = "w") -> Callable[[Path], Argv]:
    """Returns a case that plans a file whose header has one entry, written as it is."""

    def make(folder: Path) -> Argv:
        model = folder / "model"
        model.mkdir()
        shutil.copy(MODEL / "config.json", model)
        header = f"{{{json.dumps(name)}: {entry}}}".encode()
        (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        return "plan", str(model)

    return make


def headers() -> Iterator[Case]:
    for number in ("-1", str(2**62), str(2**63), str(2**64), DIGITS, "true", "1.0", "1e400", "NaN"):
        for entry in (
            '{"dtype": "F32", "shape": [@], "data_offsets": [0, 8]}',
            '{"dtype": "F32", "shape": [0, @, @], "data_offsets": [0, 0]}',
            '{"dtype": "F32", "shape": [2], "data_offsets": [0, @]}',
        ):
            yield "headers", f"{entry} @={number[:24]}", safetensors(entry.replace("@", number))
    dims = ("1, " * 100_000).rstrip(", ")
    yield "headers", "100,000 dims", safetensors(f'{{"dtype": "F32", "shape": [2, {dims}], "data_offsets": [0, 8]}}')
    yield "headers", "deep", safetensors("[" * 100_000)
    names = {
        "5,000 digits": f"model.layers.{DIGITS}.mlp.up_proj.weight",
        "superscript": "model.layers.².mlp.up_proj.weight",
        "other digits": "model.layers.٣.mlp.up_proj.weight",
        "1 MB of dots": "." * 1_000_000,
        "1 MB of digits": "model.layers.0.mlp.up_proj.weight" + "1" * 1_000_000,
        "1 MB of layers": "model.layers." * 80_000 + "weight",
        "huge layer": "model.layers.99999999999999.mlp.up_proj.weight",
    }
    sound = '{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
    for name, tensor in names.items():
        yield "names of tensors", name, safetensors(sound, tensor)
    for number in (DIGITS, str(2**64), "-1", "NaN"):
        index = '{"metadata": {"total_size": @}, "weight_map": {"w": "model-00001-of-00001.safetensors"}}'
        yield "index", f"total_size={number[:24]}", _index(index.replace("@", number))
        yield "index", f"weight_map={number[:24]}", _index(f'{{"weight_map": {{"w": {number}}}}}')


def _index(text: str) -> Callable[[Path], Argv]:
    def make(folder: Path) -> Argv:
        model = copy_model(folder)
        (model / "model.safetensors.index.json").write_text(text)
        return "plan", str(model)

    return make


UINT32, UINT64, INT64, STRING, ARRAY = 4, 10, 11, 8, 9


def gguf_text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf(
    values: dict[str, tuple[int, bytes]], tensors: Sequence[tuple[str, tuple[int, ...], int]] = (), **counts: int
) -> Callable[[Path], Argv]:
    """Returns a case that plans a GGUF file.

    Args:
        values: key -> number of the type and the bytes, which replace those of a sound llama.
        tensors: name, dims, and offset of each; the file has 64 bytes of data.
        counts: numbers of tensors and of values, where the header tells other ones than it has.
    """
    sound: dict[str, tuple[int, bytes]] = {
        "general.architecture": (STRING, gguf_text("llama")),
        **{
            f"llama.{key}": (UINT32, struct.pack("<I", number))
            for key, number in {
                "block_count": 1, "context_length": 128, "embedding_length": 8, "feed_forward_length": 16,
                "attention.head_count": 2, "attention.head_count_kv": 2, "vocab_size": 16, "rope.dimension_count": 4,
            }.items()
        },
        "llama.attention.layer_norm_rms_epsilon": (6, struct.pack("<f", 1e-6)),
    }  # fmt: skip

    def make(folder: Path) -> Argv:
        given = sound | values
        raw = b"GGUF" + struct.pack(
            "<IQQ", 3, counts.get("tensor_count", len(tensors)), counts.get("value_count", len(given))
        )
        for key, (kind, value) in given.items():
            raw += gguf_text(key) + struct.pack("<I", kind) + value
        for name, dims, offset in tensors:
            raw += gguf_text(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
            raw += struct.pack("<IQ", 0, offset)
        raw += bytes(-len(raw) % 32 + 64)
        (folder / "model.gguf").write_bytes(raw)
        return "plan", str(folder / "model.gguf")

    return make


def ggufs() -> Iterator[Case]:
    one = [("token_embd.weight", (8, 2), 0)]
    for key in (
        "block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
        "vocab_size", "context_length", "expert_count", "expert_used_count", "rope.dimension_count",
    ):  # fmt: skip
        for number in (0, 10**9, 2**63, 2**64 - 1):
            yield "GGUF values", f"{key}={number}", gguf({f"llama.{key}": (UINT64, struct.pack("<Q", number))}, one)
        yield "GGUF values", f"{key}=-1", gguf({f"llama.{key}": (INT64, struct.pack("<q", -1))}, one)
    for number in (10**9, 2**63, 2**64 - 1):
        yield "GGUF counts", f"{number} tensors", gguf({}, one, tensor_count=number)
        yield "GGUF counts", f"{number} values", gguf({}, one, value_count=number)
        for inner in (UINT32, STRING, ARRAY):
            array = {"tokenizer.ggml.tokens": (ARRAY, struct.pack("<IQ", inner, number))}
            yield "GGUF counts", f"array of {number} of type {inner}", gguf(array, one)
        yield "GGUF counts", f"text of {number} bytes", gguf({"general.name": (STRING, struct.pack("<Q", number))}, one)
        yield "GGUF counts", f"dim {number}", gguf({}, [("token_embd.weight", (8, number), 0)])
        yield "GGUF counts", f"offset {number}", gguf({}, [("token_embd.weight", (8, 2), number // 32 * 32)])
    yield "GGUF counts", "100,000 dims", gguf({}, [("token_embd.weight", (1,) * 100_000, 0)])
    nested = struct.pack("<IQ", ARRAY, 1) * 100_000
    yield "GGUF counts", "arrays of arrays", gguf({"general.name": (ARRAY, nested)}, one)
    for number in (0, 3, 2**31, 2**32 - 1):
        yield (
            "GGUF counts",
            f"alignment {number}",
            gguf({"general.alignment": (UINT32, struct.pack("<I", number))}, one),
        )
        yield "GGUF counts", f"split {number}", gguf({"split.count": (UINT32, struct.pack("<I", number))}, one)


def cases() -> Iterator[Case]:
    """Yields all cases."""
    for kind in (configs, quantizations, options, headers, ggufs):
        yield from kind()


def tried(chosen: Sequence[Case], patience: float = 60.0) -> Iterator[Trial]:
    """Tries cases, each in a fork and a folder of its own."""
    for kind, name, make in chosen:
        with tempfile.TemporaryDirectory() as folder:
            yield Trial(kind, name, attempt(command(*make(Path(folder))), patience=patience))


def main(chosen: Sequence[Case], words: Sequence[str]) -> int:
    """Tries the cases whose kind and name hold all words; prints a table, and whatever ended badly."""
    warm(MODEL)
    trials = []
    for trial in tried([case for case in chosen if all(word in f"{case[0]}: {case[1]}" for word in words)]):
        trials.append(trial)
        print(*failures([trial]), sep="", end="" if trial.good else "\n", flush=True)
    print(table(trials))
    slowest = sorted(trials, key=lambda trial: -trial.ended.cpu_seconds)[:5]
    print(*(f"{trial.ended.cpu_seconds:.1f} s: {trial.kind}: {trial.name}" for trial in slowest), sep="\n")
    return 0 if all(trial.good for trial in trials) else 1


if __name__ == "__main__":
    sys.exit(main(list(cases()), sys.argv[1:]))
