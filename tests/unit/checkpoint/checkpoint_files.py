"""Writes checkpoints, sound and hostile, byte by byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def entry(dtype: str, shape: list[Any], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    """A file with this header, whether it is right or not: a dict as JSON, a str or bytes as they are."""
    raw = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def write_shard(path: Path, **shapes: list[int]) -> Path:
    """A sound file of U8 tensors."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 1
        for dim in shape:
            size *= dim
        header[name] = entry("U8", shape, end, end + size)
        end += size
    path.write_bytes(safetensors_bytes(header, bytes(end)))
    return path


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
