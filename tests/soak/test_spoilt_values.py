"""A part of the soak of stored values: one checkpoint for each kind of component."""

from __future__ import annotations

from pathlib import Path

import pytest
import stored_values
import trials


@pytest.mark.wide
@pytest.mark.parametrize(
    "base", ["fp8/tensor", "gptq/v2-3bit-act-order", "torchao/int4-group", "compressed_tensors/int4-zeros"]
)
def test_a_spoilt_value_is_refused_with_the_name_of_its_weight(base: str, kjv_tiny: str, tmp_path: Path) -> None:
    found = list(stored_values.run(kjv_tiny, [base], tmp_path))
    assert len(found) > 20
    assert not list(trials.failures(found))
