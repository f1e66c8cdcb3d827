"""Stored values that a kernel would take for other numbers: each method declares which, and a load refuses them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import spoilt_values
import torch
from spoilt_values import NESTED_STATE, STATE, Case, put
from torch import Tensor

import distquant as dq
from distquant import InputError
from distquant.config import parse
from distquant.quantization import QuantizedScheme, config_classes, scheme_for
from distquant.quantization.algorithms.quant_state import read_state
from distquant.quantization.stored_values import DIVISORS, FINITE, MAGNITUDES, exponents, integers_of

NAME, SHAPE = "model.layers.0.mlp.down_proj.weight", (128, 256)

REPRESENTATIVES = {
    "gptq/v1-4bit": "scales",
    "gptq/v2-3bit-act-order": "g_idx",
    "awq/gemm": "scales",
    "fp8/tensor": "activation_scale",
    "mxfp8": "weight_scale_inv",
    "fbgemm_fp8": "weight_scale",
    "hqq/4-bits": "zero",
    "quanto/int4": "weight._shift",
    "torchao/int4-group": "_weight_qdata",
    "compressed_tensors/int4": "weight_scale",
}
"""Checkpoint -> a component, of which the first wrong value is tried here; the others are tried in the soak."""


@pytest.mark.parametrize("base", REPRESENTATIVES)
def test_a_load_refuses_a_spoilt_value_with_the_name_of_its_weight(base: str, tmp_path: Path) -> None:
    suffix = REPRESENTATIVES[base]
    values = {"g_idx": "all 0", "_weight_qdata": "8", "weight_scale_inv": "255"}
    name = values.get(suffix, "nan")
    case = next(case for case in spoilt_values.cases(base) if (case.suffix, case.name) == (suffix, name))
    module = spoilt_values.spoilt(spoilt_values.write_base(base, "", tmp_path / "stored"), case, tmp_path / "spoilt")
    with pytest.raises(InputError, match=f"{module}.weight: "):
        dq.load(tmp_path / "spoilt")


@pytest.mark.parametrize("check", [FINITE, MAGNITUDES, DIVISORS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_numbers_are_judged_in_every_dtype(check, dtype) -> None:
    fine = torch.linspace(0.5, 4, 40).to(dtype)
    assert check(fine) is None and check(fine[:0]) is None
    assert str(check(put(math.nan, fine))).startswith("nan, and must be finite")
    for value in (math.inf, -math.inf) if dtype != torch.float8_e4m3fn else ():
        assert (
            check(put(value, fine))
            == f"{value}, and must be finite"
            + ({FINITE: "", MAGNITUDES: " and at least 0", DIVISORS: " and greater than 0"}[check])
        )
    assert (check(put(0.0, fine)) is None) == (check is not DIVISORS)
    assert (check(put(-1.0, fine)) is None) == (check is FINITE)


def test_exponents_and_integers_have_their_limits() -> None:
    codes = torch.arange(255, dtype=torch.uint8)
    assert exponents(codes) is None and exponents(codes.view(torch.float8_e8m0fnu)) is None
    assert "255, which is NaN" in str(exponents(put(255, codes)))
    assert "255, which is NaN" in str(MAGNITUDES(put(255, codes).view(torch.float8_e8m0fnu)))
    four = torch.arange(-8, 8, dtype=torch.int8)
    assert integers_of(4)(four) is None and integers_of(8)(torch.arange(-128, 128).to(torch.int8)) is None
    assert integers_of(4)(put(9, four)) == "9, and must be from -8 to 7"
    assert integers_of(4)(put(-9, four)) == "-9, and must be from -8 to 7"


def schemes() -> Iterator[tuple[str, QuantizedScheme]]:
    """Yields the method of each short name, as far as it reads stored weights."""
    classes = config_classes()
    for short in sorted({short for each in classes for short in each.short_names}):
        config = parse(short, classes)
        assert config is not None
        try:
            scheme = scheme_for(config)
        except InputError:  # some methods are known by name alone
            continue
        if isinstance(scheme, QuantizedScheme) and scheme.reads_stored():
            yield short, scheme


def test_every_scale_of_every_method_has_a_check() -> None:
    """Scales are what a format's layout has beside the codes: all components of floats but its first."""
    tried = []
    for short, scheme in schemes():
        for component in scheme.layout(NAME, SHAPE, "float32").components[1:]:
            # hqq's layout is that of its encoded components, which it stores under other names.
            stored = component.name.removesuffix("s") if scheme.name == "hqq" else component.name
            if component.dtype.startswith(("float", "bfloat")):
                tried.append((short, stored))
                assert scheme.value_check(NAME, stored) is not None, tried[-1]
    assert len(tried) > 20


def state_of(shape: tuple[int, int], nested: bool) -> Tensor:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
    if nested:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
    return spoilt_values.as_bytes(json.dumps(state).encode())


IN_HEADERS = {"as float32", "as int8", "a megabyte"}
"""Faults that are seen in a header, before a state is read."""


@pytest.mark.parametrize("nested", [False, True])
def test_every_broken_quant_state_is_one_error(nested: bool) -> None:
    stored = state_of(SHAPE, nested)
    assert read_state(NAME, stored, "nf4", SHAPE)["dtype"] == "bfloat16"
    for name, spoil in (STATE | (NESTED_STATE if nested else {})).items():
        if name not in IN_HEADERS:
            changed = spoil(stored)
            assert changed is not None
            with pytest.raises(InputError, match=f"{NAME}: its quant_state ") as caught:
                read_state(NAME, changed, "nf4", SHAPE)
            message = str(caught.value)
            assert message.replace("\n", "").isprintable() and len(message) < 600, name


def test_all_faults_of_a_quant_state_are_listed() -> None:
    text = {"quant_type": "fp4", "blocksize": 0, "shape": [1], "nested_blocksize": 0}
    with pytest.raises(InputError) as caught:
        read_state(NAME, spoilt_values.as_bytes(json.dumps(text).encode()), "nf4", SHAPE)
    message = [problem.what for problem in caught.value.problems]
    assert message == [
        "its quant_state lacks nested_dtype, dtype",
        "its quant_state has quant_type=\"fp4\", expected 'nf4'",
        "its quant_state has blocksize=0, expected 64",
        "its quant_state has shape=[1], expected [128, 256]",
        "its quant_state has nested_blocksize=0, expected 256",
        "its quant_state has nested_offset=null, expected a finite float32",
    ]


def test_faults_of_headers_are_found_before_weights_are_read(tmp_path: Path, model_of) -> None:
    folder = spoilt_values.write_base("nf4-dq", model_of("llama-gqa"), tmp_path / "stored")
    case = Case("nf4-dq", "weight.nested_absmax", "as float64", partial(spoilt_values.cast, torch.float64))
    spoilt_values.spoilt(folder, case, tmp_path / "spoilt")
    with pytest.raises(InputError, match="nested_absmax is stored as F64, and must be F32"):
        dq.plan(tmp_path / "spoilt")
