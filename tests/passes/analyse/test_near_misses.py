"""What looks like LoRA and has no weight form is refused with a code, and left as it was, bit for bit."""

import pytest
import torch

import peft_fx
from peft_fx.passes.findings import REFUSALS
from tests.support import affine_spellings
from tests.support.oracle import PAIR, Run, assert_bit_equal, gate, run, weight_form
from tests.support.spellings import NEAR_MISSES, STRICT, Case


def compiled_run(case: Case) -> tuple[Run, torch.nn.Module]:
    """One step with a fixed seed, so that dropout draws the same."""
    torch._dynamo.reset()
    module, inputs = case.make()
    f = weight_form(module, **case.options)
    torch.manual_seed(3)
    return run(f, module, inputs), f


@pytest.mark.parametrize("case", NEAR_MISSES, ids=lambda case: case.id)
def test_near_miss_is_refused(case: Case, monkeypatch):
    """No site in weight form, the expected code, and the bits of the same lowering without peft_fx."""
    got, f = compiled_run(case)
    report = peft_fx.explain(f)
    assert case.code in {r.code for r in report.refusals}, str(report)
    assert all(r.detail for r in report.refusals)
    assert not any("weight" in (s.forward, s.input_grad) for s in report.sites), str(report)
    monkeypatch.setenv("PEFT_FX_DISABLE", "1")
    want, _ = compiled_run(case)
    assert_bit_equal(got, want)


def test_every_code_has_a_near_miss():
    """But those of no adapter, and of a loss, which tests/passes/loss has."""
    missed = {case.code for case in (*NEAR_MISSES, *affine_spellings.NEAR_MISSES)}
    untried = {code for code, why in REFUSALS.items() if code not in missed}
    elsewhere = {code for code in untried if REFUSALS[code].startswith(("of no adapter yet", "of a loss"))}
    assert untried == elsewhere, "a code without a near miss in tests/support/spellings.py"


def test_dtype_boundary_is_crossed_by_default():
    """What `strict` refuses for its dtypes is rewritten without it, and passes the gate."""
    case = next(case for case in NEAR_MISSES if case.options == STRICT)
    module, inputs = case.make()
    f = weight_form(module)
    gate(f, module, inputs, resolution=PAIR)
    report = peft_fx.explain(f)
    assert [s.forward for s in report.sites] == ["weight"]
    assert report.refusals == []


class Noisy(torch.nn.Module):
    """One half of a layer whose A has noise, drawn where this graph does not reach; as is what the layer gives."""

    def __init__(self):
        super().__init__()
        self.A, self.B = (torch.nn.Parameter(torch.randn(n, m)) for n, m in ((32, 4), (4, 48)))

    def forward(self, y: torch.Tensor, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return y + x @ (self.A + noise) @ self.B


def test_a_factor_that_changes_from_call_to_call_is_refused():
    module = Noisy()
    inputs = torch.randn(2, 17, 48), torch.randn(2, 17, 32, requires_grad=True), torch.randn(32, 4)
    f = weight_form(module)
    assert_bit_equal(run(f, module, inputs), run(module, module, inputs))
    assert [r.code for r in peft_fx.explain(f).refusals] == ["input_dependent"]
