"""Every spelling of LoRA is rewritten, exactly on integers and no worse than eager on floats."""

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch

import peft_fx
from peft_fx.passes.rewrite import merge_sums
from tests.support.oracle import PAIR, assert_bit_equal, exact, gate, integers, run, to_dtype, weight_form
from tests.support.spellings import ANY_RANK, SPELLINGS, Case, K, Lora, N, R, Stack, lora, x

cases = pytest.mark.parametrize("case", SPELLINGS, ids=lambda case: case.id)


def fill(case: Case, module, inputs) -> None:
    bound = 1 if case.mixed else 2
    integers(module, 1, bound), integers(inputs, 2, bound)


def assert_rewritten(report: peft_fx.Report, case: Case, inputs) -> None:
    assert report.refusals == []
    assert report.graph_breaks == []
    assert len(report.sites) >= case.sites, str(report)
    backward = "weight" if inputs[0].requires_grad else "none"
    if case.id == "shared_down":
        backward = "activation"  # (dy1·Bᵀ + dy2·Cᵀ)·Aᵀ: the sum inside the product is the gradient of A's, too
    assert {(s.forward, s.input_grad) for s in report.sites} == {("weight", backward)}, str(report)


@cases
def test_integers_in_eager_are_exact(case: Case):
    """The oracle holds: on the integers drawn, eager in the case's dtypes gives what fp64 gives."""
    module, inputs = case.make(torch.float32)
    fill(case, module, inputs)
    reference = exact(module)
    got = run(module, module, inputs)
    for (name, want), (_, g) in zip(
        run(reference, reference, to_dtype(inputs, torch.float64)).items(), got.items(), strict=True
    ):
        assert want is g is None or torch.equal(want, g.double()), name


@cases
def test_rewritten_is_bit_equal_on_integers(case: Case):
    """y and every gradient, None-ness included, in fp64 (or in the dtypes that the case is about)."""
    module, inputs = case.make(torch.float64)
    fill(case, module, inputs)
    f = weight_form(module)
    assert_bit_equal(run(f, module, inputs), run(module, module, inputs))
    assert_rewritten(peft_fx.explain(f), case, inputs)


@cases
def test_rewritten_is_no_worse_on_floats(case: Case):
    """y and every gradient in fp32 and bf16 err at most 1.25 times as much as in eager; fp32 integers are exact."""
    for dtype in (torch.float32,) if case.mixed else (torch.float32, torch.bfloat16):
        module, inputs = case.make(dtype)
        f = weight_form(module)
        gate(f, module, inputs, resolution=PAIR if case.mixed else 0.0)
        assert_rewritten(peft_fx.explain(f), case, inputs)
        if dtype == torch.float32:
            fill(case, module, inputs)
            assert_bit_equal(run(f, module, inputs), run(module, module, inputs))


def test_spellings_of_one_map_agree():
    """The same tensors in every spelling give the same integers and the same sites."""
    runs, sites = [], []
    for spell in ANY_RANK:
        torch._dynamo.reset()
        module, inputs = Case("", lora(spell), x(2, 17, K)).make(torch.float64)
        integers(module, 1), integers(inputs, 2)
        f = weight_form(module)
        runs.append(run(f, module, inputs))
        sites.append([(s.tokens, s.in_features, s.out_features) for s in peft_fx.explain(f).sites])
    for spell, other, found in zip(ANY_RANK, runs, sites, strict=True):
        assert found == sites[0], spell.__name__
        assert_bit_equal(other, runs[0])


def test_site_says_where_and_how_large():
    """A site tells the module's path, tokens, features, rank and dtype."""
    module = Stack()
    f = weight_form(module)
    run(f, module, x(2, 17, K)())
    told = [(s.name.split(".")[0], s.tokens, s.in_features, s.out_features, s.rank) for s in peft_fx.explain(f).sites]
    assert sorted(told) == [("down", 34, N, K, R), ("up", 34, K, N, R)]
    assert {s.dtype.removeprefix("torch.") for s in peft_fx.explain(f).sites} == {"float32"}


def test_explain_before_and_after_compile_agree():
    """explain(module, x) foretells what the compile does, and computes nothing on the way."""
    module, inputs = Stack(), x(2, 17, K)()
    before = peft_fx.explain(module, *inputs, options={"peft_fx.form": "weight"})
    f = weight_form(module)
    run(f, module, inputs)
    after = peft_fx.explain(f)
    assert [(s.name, s.forward, s.input_grad) for s in before.sites] == [
        (s.name, s.forward, s.input_grad) for s in after.sites
    ]
    assert all(p.grad is None for p in module.parameters())


def test_inference_is_rewritten():
    """Without gradients there is a forward to rewrite and nothing else."""
    module, inputs = Case("", lora(ANY_RANK[0]), x(2, 17, K, grad=False)).make(torch.float64)
    integers(module, 1), integers(inputs, 2)
    f = weight_form(module)
    with torch.no_grad():
        assert torch.equal(f(*inputs), module(*inputs))
    assert [(s.forward, s.input_grad, s.adapter_grad) for s in peft_fx.explain(f).sites] == [("weight", "none", "none")]


def test_an_optimizer_step_is_seen():
    """The merged weight is built anew at each call: after a change of A and W the result follows."""
    module, inputs = Case("", lora(ANY_RANK[0]), x(33, K)).make(torch.float64)
    integers(module, 1), integers(inputs, 2)
    f = weight_form(module)
    run(f, module, inputs)
    integers(module, 3)
    assert_bit_equal(run(f, module, inputs), run(module, module, inputs))


def test_base_weight_is_never_written():
    """W, A and B hold the same bits after a step."""
    module: Lora = Case("", lora(ANY_RANK[0]), x(33, K)).make(torch.bfloat16)[0]
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    run(weight_form(module), module, to_dtype(x(33, K)(), torch.bfloat16))
    assert all(torch.equal(before[name], p) for name, p in module.named_parameters())


class OnceAndTwice(torch.nn.Module):
    """One layer used twice, its adapter added once and twice: W' is another each time."""

    def __init__(self) -> None:
        super().__init__()
        self.W = torch.nn.Parameter(torch.empty(K, N), requires_grad=False)
        self.A, self.B = torch.nn.Parameter(torch.empty(K, R)), torch.nn.Parameter(torch.empty(R, N))

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        once = x @ self.W + (x @ self.A) @ self.B
        return once * (z @ self.W + (z @ self.A) @ self.B + (z @ self.A) @ self.B)


@pytest.mark.parametrize("counted", [True, False])
def test_an_adapter_that_is_added_twice(counted: bool) -> None:
    """What is counted once where it is added twice is found, and nothing else is."""
    module = integers(OnceAndTwice().double(), 1)
    inputs = integers(to_dtype((*x(33, K)(), *x(33, K)()), torch.float64), 2)
    f = weight_form(module)
    with nullcontext() if counted else patch.object(merge_sums, "Counter", dict.fromkeys):
        got = run(f, module, inputs)
    want = run(module, module, inputs)
    assert [s.forward for s in peft_fx.explain(f).sites] == ["weight", "weight"]
    assert all(torch.equal(a, b) for a, b in zip(got.y, want.y, strict=True)) == counted
    if counted:
        assert_bit_equal(got, want)


@pytest.mark.parametrize("repeated", [True, False])
@pytest.mark.parametrize("merged", [True, False])
def test_tokens_that_are_repeated(repeated: bool, merged: bool) -> None:
    """Eager mode multiplies a view without rows of its own batch by batch, by W repeated: one matrix all the same."""

    class Repeating(Lora):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.unsqueeze(1)
            x = x.expand(-1, 3, -1, -1) if repeated else x
            return x @ self.W + (x @ (self.A @ self.B) if merged else x @ self.A @ self.B) * 2

    module = integers(Repeating(lora(ANY_RANK[0])).double(), 1)
    inputs = integers(to_dtype(x(4, 7, K)(), torch.float64), 2)
    f = weight_form(module)
    assert_bit_equal(run(f, module, inputs), run(module, module, inputs))
    (site,) = peft_fx.explain(f).sites
    assert (site.forward, site.input_grad) == ("weight", "weight")
