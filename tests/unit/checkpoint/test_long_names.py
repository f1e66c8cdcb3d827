"""Names of tensors have a limit, wherever they stand."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_files import entry, safetensors_bytes, write_config, write_index, write_shard

from distquant.checkpoint import open_checkpoint
from distquant.errors import InputError


@pytest.mark.parametrize("name", ["." * 1001, "model.layers." * 80_000])
def test_a_long_name_is_a_fault(tmp_path: Path, name: str) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes({name: entry("U8", [1], 0, 1)}, bytes(1)))
    with pytest.raises(InputError, match=rf"name of {len(name)} characters, and at most 1000 are read"):
        open_checkpoint(tmp_path)


def test_a_long_name_in_an_index_is_a_fault(tmp_path: Path) -> None:
    write_config(tmp_path)
    write_shard(tmp_path / "model-00001-of-00001.safetensors", w=[1])
    write_index(tmp_path, {"w": "model-00001-of-00001.safetensors", "x." * 501: "model-00001-of-00001.safetensors"})
    with pytest.raises(InputError, match="name of 1002 characters, and at most 1000 are read"):
        open_checkpoint(tmp_path)
