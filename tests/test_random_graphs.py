"""Random affine programs with planted LoRA motifs: bit-equal to eager, forward and all gradients."""

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

import peft_fx
from tests.oracle import assert_bit_equal, integers, run, weight_form
from tests.spellings import frozen, trained
from tests.strategies import Program, programs, same_at_every_run

EXAMPLES = 200


def test_random_programs_are_bit_equal():
    """200 programs, the same at every run; most of the planted motifs are found."""
    rewritten = []

    @same_at_every_run(EXAMPLES)
    @given(programs())
    def check(program: Program):
        torch._dynamo.reset()
        module, inputs = program.module(), program.arguments()
        want = run(module, module, inputs)
        assert all(t.abs().max() < 2**50 for _, t in want.items() if t is not None)  # exact in fp64
        f = weight_form(module)
        assert_bit_equal(run(f, module, inputs), want)
        rewritten.append(any(s.forward == "weight" for s in peft_fx.explain(f).sites))

    check()
    assert len(rewritten) >= EXAMPLES
    assert sum(rewritten) >= 0.6 * len(rewritten), f"{sum(rewritten)} of {len(rewritten)} programs rewritten"


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
