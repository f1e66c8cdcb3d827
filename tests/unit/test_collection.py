"""pytest passes over folders of some names by default, `dist` among them: tests/dist must not be one of them."""

from fnmatch import fnmatch
from pathlib import Path

import pytest


def test_no_folder_of_tests_is_passed_over(request: pytest.FixtureRequest) -> None:
    passed_over = request.config.getini("norecursedirs")
    folders = {path.parent.name for path in Path(__file__).parents[1].rglob("test_*.py")}
    assert "dist" in folders
    assert not [name for name in folders for pattern in passed_over if fnmatch(name, pattern)]
