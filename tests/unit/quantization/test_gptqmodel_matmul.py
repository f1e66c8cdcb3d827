"""Products by gptqmodel's kernels: what they are given, which is taken, and what a model keeps beside them.

The kernels here are stand-ins, which compute from the definition of the stored words. `test_gptqmodel_itself.py` runs
the library.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gptq_modules import CPU, IDS, RTN, error, inputs, loaded, module_of
from packed_words import Kind, dense_weight
from torch import nn

import distquant as dq
from distquant.errors import InputError
from distquant.options import Forward
from distquant.quantization.linear import gptqmodel_matmul
from distquant.quantization.linear.gptqmodel_matmul import TOLERANCE, missing, take_kernel


class Keeps(nn.Module):
    """A kernel for GPTQ's second version that multiplies the words as they are stored."""

    REQUIRES_FORMAT_V2 = True

    def __init__(self, *, bits: int, group_size: int, in_features: int, out_features: int, **asked: Any):
        super().__init__()
        self.kind, self.asked = Kind(bits=bits, group=group_size, v1=False), asked
        groups = 1 if group_size == -1 else in_features // group_size
        sizes = {
            "qweight": (in_features * bits // 32, out_features),
            "qzeros": (groups, out_features * bits // 32),
            "scales": (groups, out_features),
            "g_idx": (in_features,),
        }
        for name, size in sizes.items():
            self.register_buffer(name, torch.empty(size, dtype=torch.float16 if name == "scales" else torch.int32))

    def qzero_format(self, number: int) -> None:
        assert number == 2

    def post_init(self) -> None:
        self.dense = dense_weight(dict(self.named_buffers()), self.kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.dense.t().to(x.dtype)


class Rearranges(Keeps):
    """Keeps the words in another order."""

    def post_init(self) -> None:
        super().post_init()
        self.qweight = self.qweight.flip(0).contiguous()


class Midpoint(Keeps):
    """Takes the midpoint for every zero point."""

    def post_init(self) -> None:
        middle = torch.full_like(self.qzeros, -0x77777778)
        self.dense = dense_weight({**dict(self.named_buffers()), "qzeros": middle}, self.kind)


class Fails(Keeps):
    def post_init(self) -> None:
        raise RuntimeError("no compiler here\nand more")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts stand-ins in the place of gptqmodel's kernels."""

    def put(*kinds: type) -> None:
        monkeypatch.setattr(gptqmodel_matmul, "missing", lambda: None)
        monkeypatch.setattr(gptqmodel_matmul, "_kinds", lambda *_: iter([(kind, None) for kind in kinds]))

    return put


# -- choosing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("v1", [True, False])
def test_zero_points_are_given_as_the_kernel_wants_them(kernels: Any, bits: int, v1: bool) -> None:
    """Random zero points, 0 among them, which the first version stores as the largest of the field."""
    kernels(Keeps)
    module = module_of(Kind(bits=bits, v1=v1))
    expected = module(inputs(module))
    assert take_kernel(module, True) is None
    assert str(module.kernel) == "gptqmodel's Keeps"
    assert error(module(inputs(module)), expected) < TOLERANCE


def test_kernels_that_fail_or_multiply_something_else_are_passed_over(kernels: Any) -> None:
    kernels(Fails, Midpoint, Keeps)
    module = module_of(Kind())
    assert take_kernel(module, True) is None
    assert str(module.kernel) == "gptqmodel's Keeps"
    kernels(Fails, Midpoint)
    module = module_of(Kind())
    reason = take_kernel(module, True)
    assert reason is not None
    assert reason.startswith(
        "Fails: no compiler here and more; Midpoint: its product differs from that of the dequantized weight"
    )
    assert module.kernel is None
    assert module(inputs(module)).isfinite().all()


def test_zero_points_tell_whether_a_weight_is_symmetric(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(gptqmodel_matmul, "_kinds", lambda *given: asked.append(given[3]) or iter([(Keeps, None)]))
    module = module_of(Kind())
    take_kernel(module, True)
    middle = torch.full_like(module.components["qzeros"], 0x77777777)  # 8, less one
    module.take({"qzeros": middle})
    take_kernel(module, True)
    assert asked == [False, True]


def test_words_stay_where_the_kernel_left_them(kernels: Any) -> None:
    kernels(Keeps)
    module = module_of(Kind(act_order=True))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert take_kernel(module, True) is None
    assert module.kernel is not None
    for name in ("qweight", "scales", "g_idx"):
        assert getattr(module.kernel.linear, name).data_ptr() == module.components[name].data_ptr()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    x = inputs(module).requires_grad_()
    back = torch.randn(2, 3, module.out_features).bfloat16()
    module(x).backward(back)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, back @ module.dequantized())
    module.half()
    assert module.kernel is not None, "a cast moves nothing"
    module.to("meta")
    assert module.kernel is None


def test_words_that_must_stay_are_not_rearranged(kernels: Any) -> None:
    kernels(Rearranges)
    module = module_of(Kind())
    assert take_kernel(module, True) == "Rearranges: it rearranges the stored words"
    assert module.kernel is None
    assert module.counted is None


def test_words_that_a_kernel_rearranged_are_not_used_again(kernels: Any) -> None:
    kernels(Rearranges)
    module = module_of(Kind())
    x = inputs(module)
    expected = module(x)
    assert take_kernel(module, False) is None
    assert error(module(x), expected) < TOLERANCE
    assert not list(module.buffers())
    told = r"m\.weight: gptqmodel's Rearranges has rearranged .* Load with forward='auto' or 'dequantize'"
    for use in (
        module.state_dict,
        module.dequantized,
        lambda: module.weight,
        lambda: module.to("meta"),
        lambda: module(x.clone().requires_grad_()).sum(),
    ):
        with pytest.raises(InputError, match=told):
            use()


@pytest.mark.parametrize(
    ("kind", "dtype", "dim", "told"),
    [
        (Kind(), "float32", None, "multiply in float16 or bfloat16, and the model is loaded as float32"),
        (Kind(act_order=True), "bfloat16", 1, "inputs are split and in the order of their activations"),
        (Kind(group=48), "bfloat16", None, "128 inputs are not a multiple of the group size 48"),
    ],
)
def test_weights_that_no_kernel_is_for(kernels: Any, kind: Kind, dtype: str, dim: int | None, told: str) -> None:
    kernels(Keeps)
    module = module_of(kind, dtype, dim)
    assert told in (take_kernel(module, True) or "")
    assert module.kernel is None


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [Keeps, Rearranges])
def test_a_model_multiplies_and_has_its_fingerprint(kernels: Any, kjv_tiny: str, kernel: type) -> None:
    kernels(kernel)
    exact, fast = loaded(kjv_tiny, "dequantize"), loaded(kjv_tiny, "gptqmodel")
    number = len(exact.distquant.plan.converted)
    assert exact.distquant.report.forward == f"dequantized and multiplied: {number} modules"
    assert fast.distquant.report.forward == f"gptqmodel's {kernel.__name__}: {number} modules"
    with torch.no_grad():
        assert error(fast(IDS).logits, exact(IDS).logits) < 0.02
    assert fast.generate(IDS, max_new_tokens=2).shape[1] > IDS.shape[1]
    assert dq.fingerprint(fast) == dq.fingerprint(exact)


def test_a_model_whose_words_are_rearranged_is_not_saved(kernels: Any, kjv_tiny: str, tmp_path: Any) -> None:
    kernels(Rearranges)
    model = loaded(kjv_tiny, "gptqmodel")
    with pytest.raises(InputError, match="has rearranged the stored words for itself: they cannot be read, saved"):
        model.save_pretrained(tmp_path)
    kernels(Keeps)
    loaded(kjv_tiny, "gptqmodel").save_pretrained(tmp_path)
    assert dq.fingerprint(dq.load(str(tmp_path), dtype="bfloat16")) == dq.fingerprint(loaded(kjv_tiny, "dequantize"))


def test_adapters_train_on_words_that_stay(kernels: Any, kjv_tiny: str) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False)
    kernels(Keeps)
    tuned = get_peft_model(loaded(kjv_tiny, "gptqmodel"), config)
    tuned(IDS, labels=IDS).loss.backward()
    gradients = [value.grad for name, value in tuned.named_parameters() if "lora_" in name]
    assert gradients
    assert all(value is not None and value.abs().sum() > 0 for value in gradients)
    kernels(Rearranges)
    with pytest.raises(InputError, match="cannot be read, saved or trained on"):
        get_peft_model(loaded(kjv_tiny, "gptqmodel"), config)


def test_a_cpu_dequantizes_by_itself(kernels: Any, kjv_tiny: str) -> None:
    kernels(Keeps)
    assert loaded(kjv_tiny, "auto").distquant.report.forward.startswith("dequantized and multiplied: ")


def test_a_gpu_takes_kernels_that_leave_the_words(kernels: Any) -> None:
    """Where the weights lie is all that is asked; here they lie on the CPU."""
    from distquant.loading.forward import _take_gptqmodel

    gpu = torch.device("cuda", 0)
    for kernel, forward, told in (
        (Keeps, Forward.AUTO, ""),
        (Rearranges, Forward.AUTO, "Rearranges: it rearranges the stored words"),
        (Rearranges, Forward.GPTQMODEL, ""),
        (Keeps, Forward.DEQUANTIZE, ""),
        (Keeps, Forward.FLOAT8, ""),
    ):
        kernels(kernel)
        module = module_of(Kind())
        assert _take_gptqmodel(module, forward, gpu) == told
        assert (module.kernel is None) == (bool(told) or forward in (Forward.DEQUANTIZE, Forward.FLOAT8))


def test_kernels_are_looked_for_where_weights_will_lie(
    kernels: Any, kjv_tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distquant.loading.forward import check_forward
    from distquant.loading.loader import scheme_of as scheme_of_plan

    kernels(Keeps)
    asked: set[torch.device] = set()
    monkeypatch.setattr(gptqmodel_matmul, "why_not", lambda scheme, shard, device, keep: asked.add(device))
    plan = dq.plan(kjv_tiny, quantization_config=RTN, device_map={"": "cpu"})
    check_forward(plan, scheme_of_plan(plan), Forward.GPTQMODEL, torch.device("cuda", 0))
    assert asked == {CPU}


def test_a_kernel_that_fails_when_asked_for_is_an_error(kernels: Any, kjv_tiny: str) -> None:
    kernels(Fails)
    with pytest.raises(InputError, match=r"gptqmodel has no kernel for model\..*: Fails: no compiler here and more\."):
        loaded(kjv_tiny, "gptqmodel")


@pytest.mark.parametrize(
    ("quant", "more", "told"),
    [
        ("nf4", {}, "'gptqmodel' is for weights that are kept in the layouts of GPTQ and AWQ; bitsandbytes_4bit as"),
        (None, {}, "'gptqmodel' is for weights that are kept in the layouts of GPTQ and AWQ; none as it is"),
        (RTN, {"dtype": "float32"}, r"no kernel for model\..* \(\d+ weights\): gptqmodel's kernels multiply in"),
        (RTN, {"device_map": {"model": "cpu", "lm_head": "disk"}}, "cannot be with a device map that offloads"),
    ],
)
def test_refused_before_weights_move(kernels: Any, kjv_tiny: str, quant: Any, more: Any, told: str) -> None:
    kernels(Keeps)
    with pytest.raises(InputError, match=f"forward: .*{told}") as caught:
        loaded(kjv_tiny, "gptqmodel", quant, **more)
    assert "Take 'auto' or 'dequantize'" in str(caught.value)


@pytest.mark.parametrize(
    ("have", "told"),
    [("7.5.0", r"gptqmodel 7\.5\.0, 7\.6\.0 or newer is needed"), (None, "gptqmodel is not installed")],
)
def test_refused_where_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, kjv_tiny: str, have: str | None, told: str
) -> None:
    versions = importlib.metadata.version

    def version(name: str) -> str:
        if name != "gptqmodel":
            return versions(name)
        if have is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return have

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(gptqmodel_matmul, "missing", missing.__wrapped__)
    with pytest.raises(InputError, match=f"forward: 'gptqmodel' cannot be: {told}"):
        loaded(kjv_tiny, "gptqmodel")
    assert loaded(kjv_tiny, "auto").distquant.report.forward.startswith("dequantized and multiplied: ")
