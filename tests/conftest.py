"""Checkpoints that tests of every kind share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Path of a family's checkpoint (see `models.FAMILIES`), written when it is first asked for."""
    from models import save_model

    root = tmp_path_factory.mktemp("models")

    def path(family: str) -> str:
        folder = root / family
        return str(folder if folder.exists() else save_model(family, folder))

    return path


@pytest.fixture(scope="session")
def moe_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Path of a mixture of experts (see `moe_models.FAMILIES`) in a form, written when it is first asked for."""
    from moe_models import save_moe

    root = tmp_path_factory.mktemp("mixtures")

    def path(family: str, form: str = "hub") -> str:
        folder = root / form / family
        return str(folder if folder.exists() else save_moe(family, folder, form))

    return path


@pytest.fixture
def copy_of(model_of: Callable[[str], str], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a family's checkpoint that the test may spoil."""

    def copy(family: str) -> Path:
        target = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(model_of(family), target)
        return target

    return copy


@pytest.fixture(scope="session")
def kjv_tiny() -> str:
    """The trained example in the repository."""
    return str(REPOSITORY / "examples" / "models" / "kjv-tiny")


@pytest.fixture(scope="session")
def kjv_llama() -> str:
    """The trained model beside the repository."""
    return beside("kjv-llama")


@pytest.fixture(scope="session")
def kjv_mixtral() -> str:
    """The trained mixture of experts beside the repository."""
    return beside("kjv-mixtral")


def beside(name: str) -> str:
    """A model beside the repository, or a visible skip."""
    folder = REPOSITORY.parent / "shared" / "models" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine")
    return str(folder)
