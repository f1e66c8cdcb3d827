"""Requirements of delegated methods, against those in transformers' own code."""

from __future__ import annotations

import inspect
import re

import pytest
from packaging.version import Version
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import import_utils

from distquant.config.requirements import REQUIREMENTS
from distquant.quantization.delegated import DelegatedScheme
from distquant.quantization.registry import discover


def test_every_delegated_method_has_a_row_and_no_other():
    delegated = [scheme for scheme in discover().values() if issubclass(scheme, DelegatedScheme)]
    assert set(REQUIREMENTS) == {scheme.config_class.quant_method for scheme in delegated}


@pytest.mark.parametrize("method", REQUIREMENTS)
def test_versions_can_be_compared(method):
    row = REQUIREMENTS[method]
    for version in (*row.packages.values(), *row.below.values()):
        Version(version)
    assert set(row.below) <= set(row.packages)


@pytest.mark.parametrize(
    ("method", "package", "constant"),
    [
        ("vptq", "vptq", import_utils.VPTQ_MIN_VERSION),
        ("nvfp4", "kernels", import_utils.KERNELS_MIN_VERSION),
    ],
)
def test_least_versions_are_theirs(method, package, constant):
    assert REQUIREMENTS[method].packages[package] == constant


@pytest.mark.parametrize(
    ("method", "package", "function"),
    [
        ("higgs", "flute-kernel", import_utils.is_flute_available),
        ("fp_quant", "fp_quant", import_utils.is_fp_quant_available),
        ("fp_quant", "qutlass", import_utils.is_qutlass_available),
        ("quark", "amd-quark", import_utils.is_quark_available),
    ],
)
def test_least_versions_that_only_their_functions_know(method, package, function):
    source = inspect.getsource(inspect.unwrap(function))
    assert re.search(r'parse\("([\d.]+)"\)', source).group(1) == REQUIREMENTS[method].packages[package]


def test_too_new_is_theirs():
    assert {row.below["kernels"] for row in REQUIREMENTS.values() if row.below} == {import_utils.KERNELS_MAX_VERSION}


@pytest.mark.parametrize("method", sorted(set(auto.AUTO_QUANTIZER_MAPPING) & set(REQUIREMENTS)))
def test_quantizing_is_theirs(method):
    """A quantizer quantizes if it has an operation for it."""
    quantizer = auto.AUTO_QUANTIZER_MAPPING[method]
    has_operation = quantizer.get_quantize_ops is not HfQuantizer.get_quantize_ops
    assert REQUIREMENTS[method].quantizes == (has_operation and not quantizer.requires_calibration)


def test_capabilities_are_theirs():
    assert "major < 10" in inspect.getsource(auto.AUTO_QUANTIZER_MAPPING["nvfp4"].validate_environment)
    assert REQUIREMENTS["nvfp4"].capability == (10, 0)
