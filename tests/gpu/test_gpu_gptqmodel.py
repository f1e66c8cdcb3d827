"""Products by gptqmodel's kernels on a GPU; skipped, visibly, where there is none or gptqmodel is missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import distquant as dq
from distquant.quantization.linear.gptqmodel_matmul import missing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

METHODS = {
    "symmetric": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "asymmetric": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False},
    "v2": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"},
    "8 bits": {"quant_method": "gptq", "bits": 8, "group_size": 32},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32},
}


@pytest.mark.parametrize("forward", ["auto", "gptqmodel"])
@pytest.mark.parametrize("quant", METHODS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_is_multiplied_by_it(kjv_tiny: str, quant: str, forward: str, dtype: str) -> None:
    """`auto` may find no kernel that leaves the words alone (AWQ in bfloat16, without a compiler), and says why."""
    if (reason := missing()) is not None:
        pytest.skip(reason)

    def loaded(how: str) -> Any:
        return dq.load(kjv_tiny, quantization_config=METHODS[quant], dtype=dtype, forward=how)

    ids = torch.arange(1, 33).view(1, -1).cuda()
    exact, fast = loaded("dequantize"), loaded(forward)
    told = fast.distquant.report.forward
    print(f"{quant}, {forward}, {dtype}: {told}")
    assert "gptqmodel's " in told if forward == "gptqmodel" else told != exact.distquant.report.forward
    with torch.no_grad():
        a, b = fast(ids).logits.float(), exact(ids).logits.float()
    assert float((a - b).norm() / b.norm()) < 0.02
    assert dq.fingerprint(fast) == dq.fingerprint(exact)
    if forward == "auto":
        assert fast.state_dict().keys() == exact.state_dict().keys()
