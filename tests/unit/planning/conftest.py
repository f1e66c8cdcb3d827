"""Skeletons of the small models, each built once."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from parallel_plans import MODELS, SMALL

from distquant.errors import Problems
from distquant.model import ModelDescription, build, describe_model

_built: dict[tuple, ModelDescription] = {}


@pytest.fixture
def make(tmp_path_factory):
    """A skeleton by the name of its model, built once per configuration."""

    def description(case: str, **more) -> ModelDescription:
        key = (case, *sorted(more.items()))
        if key not in _built:
            folder: Path = tmp_path_factory.mktemp(case)
            name, own = MODELS[case]
            getattr(transformers, f"{name}Config")(**{**SMALL, **own, **more}).save_pretrained(folder)
            model = build(folder, "bfloat16")
            shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
            if own.get("tie_word_embeddings"):
                del shapes["lm_head.weight"]
            problems = Problems()
            _built[key] = describe_model(model, shapes, {}, problems)
            assert not problems
        return _built[key]

    return description
