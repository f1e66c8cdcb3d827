"""Hostile arguments: text that is not valid, options of every wrong form, and folders of odd shapes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from hostile_configs import WRONG
from spoiled import KJV, PROMPT, Input, write

TEXTS = {
    "empty": "",
    "space": " ",
    "newline": "a\nb",
    "escape": "\x1b[2J\x07",
    "C1": "\x9b2J",
    "surrogate": "\udcff\udc80",
    "long": "x" * 2_000,
    "slashes": "/" * 5000,
    "right to left": "\u202eabc",
    "minus": "-",
    "home": "~",
    "somebody": "~nobody-of-this-name/x",
    "brace": "{",
    "object": "{}",
    "list": "[]",
    "number": "12",
    "percent": "%s%n",
    "markup": "[red]x[/]",
    "url": "https://example.org/model",
    "words": "a b c",
    "comma": ",",
    "equals": "=",
    "digits": "9" * 5000,
    "dots": "..",
    "null": "null",
}
"""Values of options and arguments. A command line's bytes that are not UTF-8 reach Python as surrogates."""

OPTIONS = (
    "--quant",
    "--mesh",
    "--tp",
    "--dtype",
    "--device-map",
    "--max-memory",
    "--staging",
    "--capability",
    "--context",
    "--batch",
    "--revision",
    "--cache-dir",
    "--on-unsupported",
    "--attn-implementation",
    "--json",
    "--html",
    "--dispatch",
    "--ranks-per-node",
    "--device",
    "--unknown-option",
)
OF_LOAD = (
    "--report",
    "--trace",
    "--timeout",
    "--io",
    "--kernel",
    "--forward",
    "--runtime",
    "--threads",
    "--adapter",
    "--prompt",
    "--max-new-tokens",
)


def arguments() -> Iterator[Input]:
    """Yields command lines with hostile text in each place."""
    for label, text in TEXTS.items():
        for option in OPTIONS:
            for words in (
                ((f"{option}={text}",), (option, text)) if option in ("--quant", "--mesh") else ((f"{option}={text}",),)
            ):
                if option in ("--json", "--html") and label in (
                    "newline",
                    "home",
                    "minus",
                    "space",
                    "escape",
                    "C1",
                    "number",
                ):
                    continue  # writes a file of that name where the test runs
                yield Input("argument", f"{option} {label}", commands=(("plan", "MODEL", *words),))
        for option in OF_LOAD:
            if option in ("--report", "--trace") and label not in ("empty", "NUL", "long", "slashes", "dots"):
                continue
            yield Input("argument", f"{option} {label}", commands=(("load", "MODEL", f"{option}={text}"),))
        for command in ("plan", "load", "inspect", "perplexity", "verify", "chat", "demo"):
            more = ("--text", "COPY/config.json") if command == "perplexity" else ()
            yield Input("argument", f"{command} MODEL {label}", commands=((command, text, *more),))
        yield Input("argument", f"command {label}", commands=((text, "MODEL"),))
        yield Input("argument", f"one more {label}", commands=(("plan", "MODEL", text),))
        yield Input("argument", f"perplexity --text {label}", commands=(("perplexity", "MODEL", "--text", text),))
        yield Input("argument", f"doctor --quant {label}", commands=(("doctor", "--quant", text),))
        yield Input(
            "argument", f"verify --mesh {label}", commands=(("verify", "MODEL", f"--mesh={text}", "--mesh=tp=1"),)
        )


RAW = {
    "binary": b"\x00\xff\x80\x1b[2J",
    "deep": b'{"a":' * 100_000,
    "deep list": b'{"a":' + b"[" * 100_000,
    "mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"quant_method": "gptq"}'.encode("utf-16"),
    "surrogate": b'{"quant_method": "\\ud800"}',
    "nothing": b"",
    "twice": b'{"bits": 4, "bits": 8}',
    "digits": b'{"bits": ' + b"9" * 5000 + b"}",
    "constant": b'{"quant_method": "bitsandbytes", "load_in_4bit": true, "llm_int8_threshold": NaN}',
    "escape": b'{"quant_method": "\\u001b[2J"}',
    "escaped key": b'{"quant_method": "bitsandbytes", "load_in_4bit": true, "\\u001b[2J": 1}',
    "surrogate key": b'{"quant_method": "bitsandbytes", "load_in_4bit": true, "\\ud800": 1}',
    "list": b"[1]",
    "text": b'"nf4"',
    "spaces": b" " * 1000,
    "wide list": b'{"quant_method": "bitsandbytes", "load_in_4bit": true, "llm_int8_skip_modules": ['
    + b'"a",' * 100_000
    + b'"a"]}',
}


def quant_json() -> Iterator[Input]:
    """Yields JSON of `--quant`, in a file and on the command line."""
    for label, raw in RAW.items():
        yield Input(
            "--quant JSON",
            f"file {label}",
            KJV,
            partial(lambda folder, r: write(folder / "q.json", r), r=raw),
            (("plan", "MODEL", "--quant", "COPY/q.json"),),
        )
        text = raw.decode(errors="surrogateescape")
        if "\0" not in text:
            yield Input(
                "--quant JSON",
                f"text {label}",
                commands=(("plan", "MODEL", f"--quant={text}"), ("load", "MODEL", f"--quant={text}")),
            )
        for option in ("--device-map", "--max-memory"):
            yield Input("--quant JSON", f"{option} {label}", commands=(("plan", "MODEL", f"{option}={text}"),))
    fields: dict[str, dict[str, Any]] = {
        "bitsandbytes": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "bfloat16",
            "llm_int8_skip_modules": [],
            "include_modules": [],
            "layers": "1",
            "dequantize": False,
        },
        "hqq": {"quant_config": {}, "skip_modules": []},
        "quanto": {"weights": "int8", "modules_to_not_convert": []},
        "torchao": {"quant_type": {}, "include_input_output_embeddings": False},
        "fp8": {"weight_block_size": [128, 128], "modules_to_not_convert": []},
        "compressed-tensors": {"config_groups": {}, "ignore": [], "format": "int-quantized"},
    }
    for method, known in fields.items():
        for key in ("quant_method", *known):
            for label, value in WRONG.items():
                text = json.dumps({"quant_method": method, **known, key: value})
                yield Input(
                    "--quant JSON",
                    f"{method} {key}={label}",
                    commands=(("plan", "MODEL", f"--quant={text}"), ("load", "MODEL", f"--quant={text}")),
                )
    for label, value in WRONG.items():
        for option in ("--device-map", "--max-memory"):
            for key in ("", "0", "cpu", "lm_head", "\ud800", "\x1b[2J"):
                yield Input(
                    "--quant JSON",
                    f"{option} {key!r}={label}",
                    commands=(("plan", "MODEL", f"{option}={json.dumps({key: value})}"),),
                )


def folders() -> Iterator[Input]:
    """Yields folders of odd shapes."""

    def loop(name: str, folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(folder / name)

    def directory(name: str, folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    def gone(name: str, folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)

    def dangling(name: str, folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(folder / "\x1b[2J")

    prompted = (("load", "MODEL", *PROMPT),)
    for name in (
        "config.json",
        "model.safetensors.index.json",
        "model.safetensors",
        "model-00002-of-00003.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "quanto_qmap.json",
        "adapter_config.json",
        "chat_template.jinja",
        "special_tokens_map.json",
        "added_tokens.json",
        "additional_chat_templates",
    ):
        for how in (loop, directory, gone, dangling):
            yield Input("folder", f"{how.__name__} {name}", KJV, partial(how, name), prompted)
    for label, odd in (("escape", b"\x1b[2J"), ("binary", b"\xff\xfe"), ("newline", b"a\nb")):

        def renamed(folder: Path, odd: bytes = odd) -> None:
            os.mkdir(os.fsencode(folder) + b"/" + odd)
            for file in KJV.iterdir():
                os.symlink(os.fsencode(file), os.fsencode(folder) + b"/" + odd + b"/" + os.fsencode(file.name))

        place = f"COPY/{os.fsdecode(odd)}"
        yield Input(
            "folder", f"named {label}", KJV, renamed, (("plan", place), ("load", place, *PROMPT), ("inspect", place))
        )
        yield Input(
            "folder",
            f"named {label}, as a page",
            KJV,
            renamed,
            (("plan", place, "--html", "COPY/x.html", "--json", "COPY/x.json"),),
        )
        yield Input(
            "folder",
            f"named {label}, with a report",
            KJV,
            renamed,
            (("load", place, "-q", "nf4", "--report", "COPY/r.json", "--trace", "COPY/t.json"),),
        )
