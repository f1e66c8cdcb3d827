"""The files beside the weights that transformers itself reads: each is checked first.

transformers opens any file of the right name. It would wait for a pipe, or read a device, forever.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from distquant.errors import Problem
from distquant.files import CONFIG_BYTES, TOKENIZER_BYTES, check_file

MODEL_FILES = ("config.json", "config.*.json", "generation_config.json", "adapter_config.json", "*.py")
"""Files that are read to build a model; `config.*.json` is for a certain version of transformers."""

TOKENIZER_FILES = (
    "config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "*vocab*.json", "vocab*.txt",
    "merges.txt", "dict.txt", "*.model", "*.spm", "*.tiktoken", "tekken.json", "bpe.codes", "chat_template*", "*.py",
)  # fmt: skip
"""`VOCAB_FILES_NAMES` of transformers' tokenizers (5.23), and the files that all of them read."""

TEMPLATES = "additional_chat_templates"
"""Folder of a tokenizer's further templates."""

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
"""Files that are read as well if transformers loads the weights."""


def model_file_problems(path: Path, *, weights: bool = False) -> Iterator[Problem]:
    """Yields the files of a checkpoint (a folder, or one GGUF file) that transformers might never finish reading.

    Args:
        path: the folder or file.
        weights: True if transformers loads the weights.
    """
    if os.path.isdir(path):
        yield from _problems(path, MODEL_FILES, CONFIG_BYTES)
        if weights:
            yield from _problems(path, WEIGHT_FILES, None)
    else:
        yield from _wrong(path, None)


def tokenizer_file_problems(path: Path) -> Iterator[Problem]:
    """Yields such files of a tokenizer."""
    if os.path.isdir(path):
        yield from _problems(path, TOKENIZER_FILES, TOKENIZER_BYTES)
        yield from _problems(path / TEMPLATES, ("*.jinja",), TOKENIZER_BYTES)
    else:
        yield from _wrong(path, None)


def _problems(folder: Path, patterns: Iterable[str], limit: int | None) -> Iterator[Problem]:
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return  # reported by the code that opens the required files
    for name in names:
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            yield from _wrong(folder / name, limit)


def _wrong(path: Path, limit: int | None) -> Iterator[Problem]:
    try:
        check_file(path, limit)
    except FileNotFoundError:
        return  # a dangling link is like a missing file
    except OSError as error:
        yield Problem(str(path), f"cannot be read ({error.strerror})", "Put the model's own file there")
