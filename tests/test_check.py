"""`peft_fx.check`: what it says of models that are fine, and of ones that are not."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

import peft_fx
from peft_fx.passes import rewrite
from tests.oracle import EAGER, WEIGHT
from tests.spellings import BF16, Lora, linear, peft_casts


class Dropped(Lora):
    """An adapter behind dropout, as PEFT has it in training."""

    def __init__(self) -> None:
        super().__init__(linear)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.W + (self.dropout(x) @ self.A) @ self.B


def x(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(200, 96, dtype=dtype)


@pytest.fixture(autouse=True)
def without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's place is taken by eager ops: what is checked here is what `check` makes of the numbers."""
    real = torch.compile

    def compile(model: Any, **kwargs: Any) -> Any:
        return real(model, **({"backend": "aot_eager"} if "backend" not in kwargs else kwargs))

    monkeypatch.setattr(torch, "compile", compile)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_model_that_is_fine(dtype: torch.dtype) -> None:
    module = Lora(peft_casts).to(torch.float32)
    module.W.data = module.W.data.to(dtype)
    given = x(dtype)
    before = {n: p.clone() for n, p in module.named_parameters()}
    found = peft_fx.check(module, given, options=WEIGHT)
    assert found.ok, found
    assert found.reference == "float64"
    assert [v.name for v in found.variants] == ["eager", "Inductor", "peft_fx"]
    assert all(0 < v.error < 0.1 and v.kept > 0 and v.peak >= v.kept for v in found.variants)
    assert "1 of 1 adapters in weight form" in found.verdict
    assert found.verdict in str(found)
    assert found.to_dict()["ok"] is True
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in module.named_parameters())


def test_a_wrong_rewrite_is_told() -> None:
    real = rewrite.Rewriter._merge

    def merge(self: Any, weight: Any, inner: Any, terms: Any, dtype: Any) -> Any:
        return self.build.call(torch.ops.aten.mul.Tensor, real(self, weight, inner, terms, dtype), 1.01)

    with patch.object(rewrite.Rewriter, "_merge", merge):
        found = peft_fx.check(Lora(linear), x().requires_grad_(), options=WEIGHT)
    assert not found.ok
    assert any("the loss errs" in p for p in found.problems)
    assert "Something speaks against it" in found.verdict


def test_a_failure_is_told() -> None:
    with (
        patch.object(rewrite.Rewriter, "_merge", side_effect=RuntimeError("injected")),
        pytest.warns(RuntimeWarning, match="untouched"),
    ):
        found = peft_fx.check(Lora(linear), x(), options=WEIGHT)
    assert not found.ok
    assert "injected" in found.problems[0]


def test_what_is_drawn_is_judged_as_in_evaluation() -> None:
    module, given = Dropped(), x()
    state = torch.get_rng_state()
    found = peft_fx.check(module, given, options=EAGER)
    assert found.ok, found
    assert module.training
    assert [r.code for r in found.report.refusals] == ["dropout"]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_without_adapters() -> None:
    assert "no adapter" in peft_fx.check(nn.Linear(4, 4), torch.randn(3, 4), options=EAGER).verdict


def test_what_cannot_be_checked() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        peft_fx.check(lambda x: x, x())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="to train"):
        peft_fx.check(nn.Linear(4, 4).requires_grad_(False), torch.randn(3, 4))
    with pytest.raises(ValueError, match="no option"):
        peft_fx.check(nn.Linear(4, 4), torch.randn(3, 4), options={"peft_fx.what": 1})
