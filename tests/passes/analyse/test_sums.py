"""Sums that read a value twice: bit-equal to eager, forward and all gradients."""

import pytest
import torch
from torch import Tensor, nn

import peft_fx
from tests.support.oracle import assert_bit_equal, integers, run, weight_form
from tests.support.spellings import frozen, trained


class Twice(nn.Module):
    """A sum that reads one value twice, and holds more than the product and its adapter."""

    def __init__(self, alpha: float):
        super().__init__()
        self.W, self.A, self.B = frozen(5, 6), trained(5, 3), trained(3, 6)
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        t = x[:, :1] + x @ self.W + (x @ self.A) @ self.B
        return torch.add(t, t, alpha=self.alpha)


@pytest.mark.parametrize("alpha", [1, 0.5, -1])
@pytest.mark.parametrize("grad", [True, False])
def test_a_sum_may_read_a_value_twice(alpha: float, grad: bool):
    module = integers(Twice(alpha).double(), 1)
    x = torch.randint(-2, 3, (8, 5), generator=torch.Generator().manual_seed(2)).double().requires_grad_(grad)
    f = weight_form(module)
    assert_bit_equal(run(f, module, (x,)), run(module, module, (x,)))
    assert [s.forward for s in peft_fx.explain(f).sites] == ["weight"]
