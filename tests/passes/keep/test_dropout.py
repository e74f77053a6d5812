"""LoRA dropout through Inductor's own code: the mask of plain Inductor, rebuilt from its seed."""

from __future__ import annotations

import pytest
import torch

import peft_fx
from tests.support.peft_models import adapt, mlp

pytestmark = pytest.mark.slow


def trained(f, module, x):
    """Loss and gradients of one step from a fixed seed."""
    module.zero_grad(set_to_none=True)
    torch.manual_seed(11)
    loss = f(x).square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in module.named_parameters()}


def test_dropout_is_the_mask_of_plain_inductor():
    """The loss is bit-equal to plain Inductor's with the same seed, the gradients are its own up to rounding, and the
    adapters are refused."""
    module = adapt(mlp(), r=4, lora_dropout=0.25).train()
    x = torch.randn(64, next(p for p in module.parameters() if p.ndim == 2).shape[1])
    plain = trained(torch.compile(module), module, x)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=peft_fx.backend, options={"peft_fx.form": "weight"})
    ours = trained(compiled, module, x)
    report = peft_fx.explain(compiled)
    assert {r.code for r in report.refusals} == {"dropout"}
    assert torch.equal(plain[0], ours[0])
    for name, want in plain[1].items():
        got = ours[1][name]
        assert (want is None) == (got is None), name
        if want is not None:
            torch.testing.assert_close(got, want)
