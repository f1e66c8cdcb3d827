"""What methods require, against what transformers says of itself."""

from __future__ import annotations

import inspect
import re

import pytest
from packaging.version import Version
from transformers.quantizers import auto, quantizer_gptq
from transformers.quantizers.base import HfQuantizer
from transformers.utils import import_utils

from distquant.config import CONFIG_CLASSES
from distquant.config.requirements import REQUIREMENTS


def test_every_method_has_a_row():
    assert set(REQUIREMENTS) == {cls.quant_method for cls in CONFIG_CLASSES}


@pytest.mark.parametrize("method", REQUIREMENTS)
def test_versions_can_be_compared(method):
    row = REQUIREMENTS[method]
    for version in (*row.packages.values(), *row.below.values()):
        Version(version)
    assert set(row.below) <= set(row.packages)


@pytest.mark.parametrize(
    ("method", "package", "constant"),
    [
        ("bitsandbytes", "bitsandbytes", import_utils.BITSANDBYTES_MIN_VERSION),
        ("hqq", "hqq", import_utils.HQQ_MIN_VERSION),
        ("vptq", "vptq", import_utils.VPTQ_MIN_VERSION),
        ("torchao", "torchao", import_utils.TORCHAO_MIN_VERSION),
        ("compressed-tensors", "compressed-tensors", import_utils.COMPRESSED_TENSORS_MIN_VERSION),
        ("auto-round", "auto-round", import_utils.AUTOROUND_MIN_VERSION),
        ("gguf", "gguf", import_utils.GGUF_MIN_VERSION),
        ("nvfp4", "kernels", import_utils.KERNELS_MIN_VERSION),
        ("gptq", "gptqmodel", quantizer_gptq.MIN_GPTQ_VERSION),
        ("gptq", "optimum", quantizer_gptq.MIN_OPTIMUM_VERSION),
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


@pytest.mark.parametrize("method", sorted(set(auto.AUTO_QUANTIZER_MAPPING)))
def test_whether_they_quantize_is_theirs(method):
    """A quantizer quantizes where it has an operation for it; GPTQ calibrates by another way."""
    quantizer = auto.AUTO_QUANTIZER_MAPPING[method]
    has_operation = quantizer.get_quantize_ops is not HfQuantizer.get_quantize_ops
    row = REQUIREMENTS[method.removesuffix("_4bit").removesuffix("_8bit")]
    assert row.quantizes == ((has_operation and not quantizer.requires_calibration) or method == "gptq")


@pytest.mark.parametrize(
    ("method", "text"), [("fbgemm_fp8", ">= 9.0"), ("fp8", ">= 8.9"), ("mxfp4", ">= (7, 5)"), ("nvfp4", "major < 10")]
)
def test_capabilities_are_theirs(method, text):
    assert text in inspect.getsource(auto.AUTO_QUANTIZER_MAPPING[method].validate_environment)
    assert REQUIREMENTS[method].capability == tuple(map(int, [*re.findall(r"\d+", text), "0"][:2]))
