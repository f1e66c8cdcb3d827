"""Hostile headers and indices: of safetensors files, of GGUF files, and of the map of tensors to files."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from hostile_configs import WRONG
from spoiled import DATA, KJV, Input, write, write_json

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
NAMES = (
    "..",
    "../x",
    "/etc/passwd",
    "a\0b",
    "",
    ".",
    "\ud800",
    "\x1b[2J",
    "a/../b",
    "C:\\x",
    "x" * 5000,
    "é\u202e",
    "a\nb",
)


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """Returns a safetensors file's header, and the bytes behind it."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(file: Path, text: str | bytes, data: bytes, length: int | None = None) -> None:
    """Writes a safetensors file."""
    raw = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
    write(file, struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def edited(how: Any, folder: Path, name: str = SHARD) -> None:
    """Writes a file anew with what `how` makes of its header: an object, or text."""
    header, data = header_of(folder / name)
    made = how(header)
    with_header(folder / name, made if isinstance(made, (str, bytes)) else json.dumps(made), data)


def headers() -> Iterator[Input]:
    """Yields broken headers of safetensors files."""
    header, _ = header_of(KJV / SHARD)
    tensor = next(name for name in header if name != "__metadata__")

    def entry(key: str | None, value: Any, header: dict[str, Any]) -> dict[str, Any]:
        return {**header, tensor: value if key is None else {**header[tensor], key: value}}

    values = {
        **WRONG,
        "minus": [-1, 5],
        "reversed": [9, 3],
        "words": ["a", "b"],
        "floats": [0.0, 2.0],
        "three": [0, 1, 2],
        "past 64 bits": [0, 2**64],
        "flags": [False, True],
        "huge": [0, 2**62],
        "many": [1] * 100_000,
        "zeros": [0, 0],
        "many zeros": [2**40, 2**40, 0],
    }
    for label, value in values.items():
        for key in (None, "dtype", "shape", "data_offsets", "extra"):
            yield Input("safetensors header", f"{key}={label}", spoil=partial(edited, partial(entry, key, value)))
        yield Input(
            "safetensors header",
            f"__metadata__={label}",
            spoil=partial(edited, lambda h, v=value: {**h, "__metadata__": v}),
        )
        yield Input(
            "safetensors header",
            f"__metadata__.format={label}",
            spoil=partial(edited, lambda h, v=value: {**h, "__metadata__": {"format": v}}),
        )
        yield Input("safetensors header", f"all of it {label}", spoil=partial(edited, lambda h, v=value: json.dumps(v)))
    for name in NAMES:
        yield Input(
            "safetensors header",
            f"a tensor named {name[:20]!r}",
            spoil=partial(edited, lambda h, n=name: {n if k == tensor else k: v for k, v in h.items()}),
        )
    texts: dict[str, str | bytes] = {
        "twice": f'{{"a": 1, {json.dumps(header)[1:-1]}, {json.dumps(header)[1:]}',
        "deep": '{"a":' * 100_000,
        "deep list": '{"a":' + "[" * 200_000 + "]" * 200_000 + "}",
        "zeros": b"\0" * 1000,
        "binary": bytes(range(256)),
        "surrogate bytes": b'{"\xed\xa0\x80": 1}',
        "surrogate": '{"\\ud800": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}',
        "digits": '{"a": ' + "9" * 5000 + "}",
        "long fraction": '{"a": 1e' + "9" * 400 + "}",
        "constant": '{"a": NaN}',
        "spaces": " " * 1000,
        "mark": "\ufeff{}",
        "nothing": "",
        "open": "{",
        "text": '"text"',
        "names": json.dumps(dict.fromkeys(map(str, range(50_000)), 1)),
    }
    for label, text in texts.items():
        yield Input("safetensors header", label, spoil=partial(edited, lambda h, t=text: t))
    for length in (0, 1, 7, 99_999_999, 100_000_000, 100_000_001, 2**32, 2**63, 2**64 - 1):
        yield Input(
            "safetensors header",
            f"length {length}",
            spoil=partial(lambda folder, n: with_header(folder / SHARD, "{}", b"", n), n=length),
        )
    for size in (0, 1, 7, 8, 9, 100, 5000):
        yield Input(
            "safetensors header",
            f"ends at {size}",
            spoil=partial(lambda folder, n: write(folder / SHARD, (KJV / SHARD).read_bytes()[:n]), n=size),
        )


def indices() -> Iterator[Input]:
    """Yields broken indices."""
    good = json.loads((KJV / INDEX).read_text())
    tensor = next(iter(good["weight_map"]))

    def index(value: Any, folder: Path) -> None:
        write_json(folder / INDEX, value)

    for label, value in WRONG.items():
        yield Input("index", f"all of it {label}", spoil=partial(index, value))
        yield Input("index", f"weight_map={label}", spoil=partial(index, {**good, "weight_map": value}))
        yield Input("index", f"metadata={label}", spoil=partial(index, {**good, "metadata": value}))
        yield Input(
            "index", f"a file={label}", spoil=partial(index, {"weight_map": {**good["weight_map"], tensor: value}})
        )
        yield Input(
            "index",
            f"all files={label}",
            spoil=partial(index, {"weight_map": dict.fromkeys(good["weight_map"], value)}),
        )
    for name in NAMES:
        yield Input(
            "index",
            f"a file named {name[:20]!r}",
            spoil=partial(index, {"weight_map": {**good["weight_map"], tensor: name}}),
        )
        yield Input(
            "index",
            f"a tensor named {name[:20]!r}",
            spoil=partial(index, {"weight_map": {**good["weight_map"], name: SHARD}}),
        )
        yield Input(
            "index",
            f"another tensor named {name[:20]!r}",
            spoil=partial(index, {"weight_map": {**good["weight_map"], name: "x.safetensors"}}),
        )
    many = {f"model.x.{i}": f"model-{i:05d}.safetensors" for i in range(100_000)}
    yield Input("index", "100,000 files", spoil=partial(index, {"weight_map": many}))
    yield Input(
        "index",
        "100,000 tensors",
        spoil=partial(index, {"weight_map": {**good["weight_map"], **dict.fromkeys(many, SHARD)}}),
    )
    yield Input(
        "index",
        "a config as a shard",
        spoil=partial(index, {"weight_map": {**good["weight_map"], tensor: "config.json"}}),
    )
    for label, raw in (
        ("twice", json.dumps(good)[:-1] + "," + json.dumps(good)[1:]),
        ("deep", '{"a":' * 100_000),
        ("binary", b"\xff\xfe\x00"),
        ("mark", "\ufeff" + json.dumps(good)),
        ("UTF-16", json.dumps(good).encode("utf-16")),
        ("nothing", ""),
        ("digits", '{"a": ' + "1" * 5000 + "}"),
    ):
        yield Input("index", label, spoil=lambda folder, r=raw: write(folder / INDEX, r))


GGUF = DATA / "gguf" / "tiny.gguf"


def ggufs() -> Iterator[Input]:
    """Yields GGUF files with other bytes at each place of the header where a length, count or type stands."""
    content = GGUF.read_bytes()

    def with_bytes(place: int, raw: bytes, folder: Path) -> None:
        write(folder / GGUF.name, content[:place] + raw + content[place + len(raw) :])

    places = [0, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 100, 150, 200, 300, 400, 500, 700, 900, 1100]
    for place in places:
        for number in (0, 1, 2**31, 2**63, 2**64 - 1, int.from_bytes(b"\x1b[2J\x1b[2J", "little")):
            yield Input(
                "GGUF header", f"{number:#x} at {place}", GGUF, partial(with_bytes, place, struct.pack("<Q", number))
            )
    for size in (0, 3, 4, 8, 12, 24, 100, 500, 1000, len(content) - 1):
        yield Input(
            "GGUF header", f"ends at {size}", GGUF, lambda folder, n=size: write(folder / GGUF.name, content[:n])
        )
    for key in (
        b"llama.block_count",
        b"llama.embedding_length",
        b"llama.attention.head_count",
        b"general.architecture",
        b"llama.context_length",
        b"tokenizer.ggml.tokens",
        b"general.alignment",
        b"llama.feed_forward_length",
        b"llama.attention.head_count_kv",
        b"llama.rope.freq_base",
        b"tokenizer.ggml.model",
    ):
        found = content.find(key)
        if found < 0:
            continue
        after = found + len(key)
        for kind in range(14):
            yield Input(
                "GGUF value",
                f"{key.decode()} of type {kind}",
                GGUF,
                partial(with_bytes, after, struct.pack("<I", kind)),
            )
        for number in (0, 1, 3, 2**31 - 1, 2**32 - 1):
            yield Input(
                "GGUF value",
                f"{key.decode()} = {number}",
                GGUF,
                partial(with_bytes, after + 4, struct.pack("<I", number)),
            )
        for name in (b"\xff" * len(key), b"\0" * len(key), b"\x1b" * len(key), b"x" * len(key)):
            yield Input("GGUF value", f"{key.decode()} renamed {name[:2]!r}", GGUF, partial(with_bytes, found, name))
