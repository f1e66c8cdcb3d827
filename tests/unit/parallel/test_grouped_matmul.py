"""Grouped matmul against one expert at a time, with autograd's own gradients."""

from __future__ import annotations

import pytest
import torch

from distquant.parallel.grouped_matmul import grouped_matmul, has_kernel

COUNTS = (3, 1, 5, 2)


@pytest.mark.parametrize("at_once", [1, 2 * 24 * 16 * 2, 1 << 20], ids=["one", "two", "all"])
def test_equals_each_expert_alone_forward_and_backward(at_once):
    torch.manual_seed(0)
    experts = [torch.randn(24, 16, dtype=torch.bfloat16) for _ in COUNTS]
    rows = torch.randn(sum(COUNTS), 16, dtype=torch.bfloat16, requires_grad=True)
    held = 0

    def gives(weight):
        def weight_of():
            nonlocal held
            held += 1
            return weight

        return weight_of

    found = grouped_matmul(rows, [(gives(w), n) for w, n in zip(experts, COUNTS, strict=True)], at_once)
    wanted = torch.cat([part @ w.T for part, w in zip(rows.split(COUNTS), experts, strict=True)])
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    grad = torch.randn_like(found)
    (mine,) = torch.autograd.grad(found, rows, grad)
    (theirs,) = torch.autograd.grad(wanted, rows, grad)
    torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)
    assert held == 2 * len(COUNTS)  # dequantized in forward, and again in backward


def test_the_cpu_has_no_grouped_kernel():
    assert not has_kernel(torch.zeros(2, 16, dtype=torch.bfloat16), (24, 16))
