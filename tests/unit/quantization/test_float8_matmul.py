"""Products in float8: what torch's kernel is given, what transformers computes with it, and when it is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.integrations.compressed_tensors import CompressedTensorsFP8Linear
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

import distquant as dq
from distquant.errors import InputError
from distquant.options import Forward
from distquant.quantization.linear import float8_matmul
from distquant.quantization.linear.float8_matmul import LARGEST, Float8Kernel, Float8Rows, float8_rows_matmul, is_float8
from distquant.quantization.linear.quantized_linear import QuantizedLinear

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 17, 5, 40, 8, 2, 11, 29]])
METHODS = ("fp8-row", "fp8-tensor", "fbgemm_fp8")


def made(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def weight(scales: int, activation: float | None = None) -> Float8Rows:
    values = made(48, 64)
    scale = values.abs().amax(1, keepdim=True) / LARGEST if scales > 1 else values.abs().amax().view(1, 1) / LARGEST
    given = None if activation is None else torch.tensor(activation)
    return Float8Rows((values / scale).to(torch.float8_e4m3fn), scale, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales", [1, 48])
@pytest.mark.parametrize("activation", [None, 0.02])
def test_what_the_kernel_computes(dtype: torch.dtype, scales: int, activation: float | None) -> None:
    by, x = weight(scales, activation), made(10, 64, 1).view(2, 5, 64).to(dtype)
    x[0, 0] = 0
    x[0, 1] *= 1e-3
    step = x.float().abs().amax(-1, keepdim=True) / LARGEST if activation is None else torch.tensor(activation)
    step = torch.where(step > 0, step, 1.0)
    rounded = (x.float() / step).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).double() * step.double()
    expected = rounded @ (by.codes.double() * by.scale.double()).t()
    found = float8_rows_matmul(x, by)
    assert (found.dtype, found.shape) == (dtype, (2, 5, 48))
    torch.testing.assert_close(found.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    if activation is None:
        assert not found[0, 0].any()


def test_activations_beyond_a_given_scale_are_bounded() -> None:
    by, x = weight(48, 0.001), torch.full((1, 64), 1.0)
    torch.testing.assert_close(float8_rows_matmul(x, by), float8_rows_matmul(torch.full((1, 64), 0.001 * LARGEST), by))


def test_it_is_the_product_of_transformers() -> None:
    by, x = weight(48), made(7, 64, 2).bfloat16()
    theirs: Any = CompressedTensorsFP8Linear(64, 48)
    theirs.weight.data, theirs.weight_scale.data = by.codes, by.scale.t().contiguous()
    torch.testing.assert_close(float8_rows_matmul(x, by), theirs(x), rtol=2**-7, atol=0)


def loaded(path: str, quant: Any, forward: str) -> Any:
    return dq.load(path, quantization_config=quant, forward=forward, dtype="float32")


@pytest.mark.parametrize("quant", METHODS)
def test_a_model_multiplies_in_float8(kjv_tiny: str, quant: str) -> None:
    exact, rounded = loaded(kjv_tiny, quant, "dequantize"), loaded(kjv_tiny, quant, "float8")
    assert dq.fingerprint(exact) == dq.fingerprint(rounded)
    number = len(exact.distquant.plan.converted)
    assert exact.distquant.report.forward == f"dequantized and multiplied: {number} modules"
    assert rounded.distquant.report.forward == f"torch's scaled_mm with float8 activations: {number} modules"
    with torch.no_grad():
        a, b = exact(IDS).logits, rounded(IDS).logits
    error = float((a - b).norm() / a.norm())
    assert 0.001 < error < 0.1, "float8 has three bits of mantissa"


def test_gradients_flow_through_the_dequantized_weight(kjv_tiny: str) -> None:
    model = loaded(kjv_tiny, "fp8-row", "float8")
    linear = next(module for module in model.modules() if isinstance(module, QuantizedLinear))
    x = made(3, linear.in_features, 4).requires_grad_()
    back = made(3, linear.out_features, 5)
    linear(x).backward(back)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, back @ linear.dequantized())


def test_nothing_is_multiplied_of_nothing(kjv_tiny: str) -> None:
    model = loaded(kjv_tiny, "fp8-row", "float8")
    linear = next(module for module in model.modules() if isinstance(module, QuantizedLinear))
    assert linear(torch.empty(0, linear.in_features)).shape == (0, linear.out_features)


@pytest.mark.parametrize("quant", METHODS)
def test_a_cpu_dequantizes_by_itself(kjv_tiny: str, quant: str) -> None:
    assert "scaled_mm" not in loaded(kjv_tiny, quant, "auto").distquant.report.forward


@pytest.mark.parametrize(
    ("quant", "told"), [("nf4", "the modules of bitsandbytes"), ("int4", "dequantized"), (None, "")]
)
def test_the_report_names_what_multiplies(kjv_tiny: str, quant: Any, told: str) -> None:
    quant = quant if quant != "int4" else {"quant_method": "gptq", "bits": 4, "group_size": 32}
    assert dq.load(kjv_tiny, quantization_config=quant).distquant.report.forward.startswith(told)


@pytest.mark.parametrize(
    "quant",
    [
        "nf4",
        {"quant_method": "fp8", "weight_block_size": [16, 32]},
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "all": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
                }
            },
        },
    ],
    ids=["other codes", "tiles", "activations in 16 bits"],
)
def test_float8_is_refused_where_the_method_is_not_meant_so(kjv_tiny: str, quant: Any) -> None:
    with pytest.raises(InputError, match="forward: 'float8' is for float8 weights") as caught:
        dq.load(kjv_tiny, quantization_config=quant, forward="float8")
    assert "Take 'auto' or 'dequantize'" in str(caught.value)


def test_a_way_that_there_is_not(kjv_tiny: str) -> None:
    with pytest.raises(InputError, match=r"forward: unknown value 'int3'\. Choose one of: auto, dequantize, float8"):
        dq.load(kjv_tiny, forward="int3")


def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    rows, tiles = Float8Kernel.SCALED_MM, Float8Kernel.TILES
    assert [f for f in Forward if is_float8(f, rows, (64, 64), gpu)] == [Forward.AUTO, Forward.FLOAT8]
    assert [f for f in Forward if is_float8(f, rows, (64, 64), CPU)] == [Forward.FLOAT8]
    for ragged in ((60, 64), (64, 60)):  # no kernel: dequantized
        assert not is_float8(Forward.AUTO, rows, ragged, gpu)
    monkeypatch.setattr(float8_matmul, "_tiles_missing", lambda: None)
    assert is_float8(Forward.AUTO, tiles, (256, 128), gpu)
    assert not is_float8(Forward.AUTO, tiles, (256, 64), gpu)
    assert not is_float8(Forward.FLOAT8, tiles, (256, 128), CPU)
    capability = (8, 0)
    assert not is_float8(Forward.AUTO, rows, (64, 64), gpu)


def test_why_tiles_are_not_multiplied_in_float8(kjv_tiny: str) -> None:
    """Here: the kernel is not there, and this is no GPU."""
    reason = float8_matmul._tiles_missing()
    assert reason is not None
    assert reason.startswith("transformers' fp8_linear lacks its kernel (")
    with pytest.raises(InputError, match=r"forward: 'float8' cannot be: transformers' fp8_linear does not run on cpu"):
        dq.load(kjv_tiny, quantization_config="fp8", forward="float8")


def test_tiles_are_given_to_transformers(monkeypatch: pytest.MonkeyPatch, kjv_tiny: str) -> None:
    """Its kernel is for GPUs; in its place stands what it computes, from the arguments that it was given."""
    model = dq.load(kjv_tiny, quantization_config="fp8", dtype="float32")
    linear = next(module for module in model.modules() if isinstance(module, QuantizedLinear))
    given: list[Any] = []

    def fp8_linear(x: Any, weight: Any, scale: Any, block: Any, bias: Any, activation: Any) -> Any:
        given.append((x.dtype, weight.dtype, scale.dtype, block, bias, activation))
        return x @ _dequantize_fp8_weight(weight, scale, block, x.dtype).t()

    monkeypatch.setattr("transformers.integrations.finegrained_fp8.fp8_linear", fp8_linear)
    x = made(3, linear.in_features, 7)
    exact = linear(x)
    linear.float8 = True
    found = linear(x)
    assert given == [(torch.bfloat16, torch.float8_e4m3fn, torch.float32, [128, 128], None, None)]
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.02)
