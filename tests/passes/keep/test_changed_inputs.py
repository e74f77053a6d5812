"""What forward writes, backward reads as it was: the rule, each way round it, and the models that need it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import peft_fx
from peft_fx import inductor_passes
from peft_fx.passes.graph.editor import REBUILD
from peft_fx.passes.graph.nodes import aten
from peft_fx.passes.keep import changed_inputs
from peft_fx.passes.verify import VerificationError
from tests.support import joint
from tests.support.oracle import assert_bit_equal, integers, run, weight_form

K, N, R, T = 12, 10, 3, 40


class Stateful(nn.Module):
    """LoRA of which one part is a copy of what forward writes then, and perhaps reads again."""

    def __init__(self, part: str, write: Callable[[Tensor], Any], read: Callable[[Tensor], Tensor], again: bool):
        super().__init__()
        self.part, self.write, self.read, self.again = part, write, read, again
        self.W = nn.Parameter(torch.zeros(K, N), requires_grad=False)
        self.A, self.B = nn.Parameter(torch.zeros(K, R)), nn.Parameter(torch.zeros(R, N))
        sizes = {"W": (K, N), "A": (K, R), "B": (R, N), "mask": (K, R), "vector": (N,), "frozen": (R, N)}
        state = torch.zeros(sizes.get(part, ()), dtype=torch.long if part == "counter" else None)
        if part == "frozen":
            self.n = nn.Parameter(state, requires_grad=False)
        else:
            self.register_buffer("n", state)

    def layer(self, x: Tensor) -> Tensor:
        n = self.read(self.A if self.part == "trained" else self.n)
        W, A, B = (n if self.part == name else getattr(self, name) for name in "WAB")
        A = A * n if self.part == "mask" else n if self.part == "trained" else A
        B = B * n if self.part in ("vector", "frozen") else B
        s = n if self.part in ("scale", "counter") else 2
        return x @ W + (x @ A) @ B * s

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        with torch.no_grad():
            self.write(self.A if self.part == "trained" else self.n)
        return y + self.layer(x) if self.again else y


def filled(module: nn.Module) -> nn.Module:
    """In fp64, with integers in its buffers too; single numbers in fp32, as Dynamo loses the writes to them in fp64."""
    module, generator = integers(module.double(), 0), torch.Generator().manual_seed(1)
    for name, buffer in module.named_buffers():
        dtype = torch.float32 if buffer.dtype == torch.float64 and not buffer.ndim else buffer.dtype
        setattr(module, name, torch.randint(1, 4, buffer.shape, generator=generator).to(dtype))
    return module


def x64(seed: int = 2) -> Tensor:
    return integers((torch.zeros(T, K, dtype=torch.float64),), seed)[0].requires_grad_()


def as_eager(module: nn.Module, **options: Any) -> None:
    """Results, gradients and state of two steps, bit for bit."""
    other = copy.deepcopy(module)
    f = weight_form(other, **{f"peft_fx.{k}": v for k, v in options.items()})
    for seed in (2, 3):
        inputs = (x64(seed),)
        assert_bit_equal(run(f, other, inputs), run(module, module, inputs))
        for a, b in zip(other.buffers(), module.buffers(), strict=True):
            assert torch.equal(a, b)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "add": lambda n: n.add_(1),
    "mul": lambda n: n.mul_(2),
    "zero": lambda n: n.zero_(),
    "copy": lambda n: n.copy_(n * -1),
    "slice": lambda n: n[..., :1].fill_(2),
    "index": lambda n: n.index_add_(0, torch.tensor([0]), n[:1] * 1),
    "twice": lambda n: n.add_(1).mul_(3),
}
READS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda n: n * 1.0,
    "clone": lambda n: n.clone(),
    "casts": lambda n: n.float().double() * 1,
    "scaled": lambda n: n * 2,
    "ones": lambda n: n * torch.ones_like(n),
    "views": lambda n: n.view(-1).view(n.shape).clone(),
}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("part", ["W", "A", "B", "mask", "vector", "frozen", "scale", "counter", "trained"])
def test_each_part_of_an_adapter(part: str, again: bool) -> None:
    as_eager(filled(Stateful(part, WRITES["add"], READS["identity"], again)))


@pytest.mark.parametrize("form", ["auto", "weight", "activation"])
@pytest.mark.parametrize("write", WRITES)
def test_each_way_to_write(write: str, form: str) -> None:
    as_eager(filled(Stateful("B", WRITES[write], READS["identity"], write == "copy")), form=form)


@pytest.mark.parametrize("keep", ["recompute", "inductor"])
@pytest.mark.parametrize("read", READS)
def test_each_way_to_read(read: str, keep: str) -> None:
    as_eager(filled(Stateful("B", WRITES["add"], READS[read], read == "clone")), keep=keep)


def test_two_forwards_before_two_backwards() -> None:
    module = filled(Stateful("B", WRITES["add"], READS["identity"], True))
    gradients = []
    for f in (module, weight_form(other := copy.deepcopy(module))):
        first, second = f(x64(2)).sum(), f(x64(3)).square().sum()
        first.backward(), second.backward()
        gradients.append([p.grad for p in (module if f is module else other).parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


# ------------------------------------------------------------------------------------------------- what models do so


class BatchNormed(nn.Module):
    """Running statistics, of which one scales an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.lora = nn.BatchNorm1d(K), Stateful("B", lambda n: None, lambda n: n * 1, False)

    def forward(self, x: Tensor) -> Tensor:
        before = self.norm.running_var.mean() * 1.0
        h = self.norm(x)
        return self.lora(h) * before + self.lora(h) * self.norm.running_var.mean()


class Averaged(nn.Module):
    """A moving average of B, updated in forward, is half of the adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(K, N), requires_grad=False)
        self.A, self.B = nn.Parameter(torch.randn(K, R)), nn.Parameter(torch.randn(R, N))
        self.register_buffer("ema", torch.randn(R, N))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.W + (x @ self.A) @ (self.B + self.ema)
        with torch.no_grad():
            self.ema.mul_(0.5).add_(self.B, alpha=0.5)
        return y + (x @ self.A) @ (self.B * self.ema)


class Spectral(nn.Module):
    """A's spectral norm by power iteration, whose vectors are buffers that forward writes."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Linear(K, N, bias=False).requires_grad_(False)
        self.A = parametrizations.spectral_norm(nn.Linear(K, R, bias=False))
        self.B = nn.Linear(R, N, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.W(x) + self.B(self.A(x))


class Scheduled(nn.Module):
    """A counter of steps that scales the adapter, counted on after it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(K, N), requires_grad=False)
        self.A, self.B = nn.Parameter(torch.randn(K, R)), nn.Parameter(torch.randn(R, N))
        self.register_buffer("step", torch.tensor(1))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.W + (x @ self.A) @ self.B * (self.step / 10).clamp(max=1)
        self.step += 1
        return y


class Tied(nn.Module):
    """Two adapters with one B, which is scaled under no_grad between them."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(K, N), requires_grad=False)
        self.A, self.B = nn.Parameter(torch.randn(K, R)), nn.Parameter(torch.randn(R, N))
        self.C = self.B

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.W + (x @ self.A) @ (self.B * 1.0)
        with torch.no_grad():
            self.C.mul_(0.5)
        return y + (x @ self.A) @ (self.C * 1.0)


class Unadapted(nn.Module):
    """No adapter at all, and gradients of x that plain Inductor has wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.rand(K))

    def forward(self, x: Tensor) -> Tensor:
        y = x * (self.n * 2)
        self.n.add_(1)
        return y.sin()


@pytest.mark.parametrize("form", ["auto", "weight"])
@pytest.mark.parametrize("make", [BatchNormed, Averaged, Spectral, Scheduled, Tied, Unadapted])
def test_hidden_state(make: type[nn.Module], form: str) -> None:
    """Two steps as in eager mode, in fp64: results, gradients and what is left in the state."""
    torch.manual_seed(0)
    module = make().double()
    other = copy.deepcopy(module)
    f, x = weight_form(other, **{"peft_fx.form": form}), torch.randn(T, K, dtype=torch.float64)
    for _ in range(2):
        given = [x.clone().requires_grad_() for _ in range(2)]
        for call, model, inputs in ((module, module, given[0]), (f, other, given[1])):
            model.zero_grad()
            call(inputs).square().mean().backward()
        torch.testing.assert_close(given[1].grad, given[0].grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(dict(other.named_buffers()), dict(module.named_buffers()), rtol=1e-9, atol=1e-12)
        for p, q in zip(other.parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


def test_an_input_with_a_gradient() -> None:
    """The caller writes it, after the graph: only the results' descriptions tell."""

    class Scaled(Stateful):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x * 1.0)
            x.mul_(2)
            return y + super().forward(x * 1.0)

    module = filled(Scaled("", lambda n: None, lambda n: n, False))
    runs = []
    for f, own in ((module, module), (weight_form(other := copy.deepcopy(module)), other)):
        leaf = x64()
        changed = leaf * 1
        y = f(changed)
        y.square().sum().backward()
        runs.append([y, changed, leaf.grad, own.A.grad, own.B.grad])
    assert all(map(torch.equal, *runs))


def test_a_model_that_writes_nothing_is_copied_nothing() -> None:
    case = joint.capture(filled(Stateful("B", lambda n: None, READS["identity"], True)), x64())
    graph, _ = case.rewritten(form="weight")
    assert not graph.find_nodes(op="call_function", target=aten.clone.default)


def test_what_backward_has_no_use_for_is_not_copied() -> None:
    class Counting(Stateful):
        def forward(self, x: Tensor) -> Tensor:
            self.n.add_(1)
            return F.linear(x, self.W.t()) + (x @ self.A) @ self.B

    case = joint.capture(filled(Counting("counter", lambda n: None, lambda n: n, False)), x64())
    graph, outcome = case.rewritten(form="weight")
    assert outcome.sites
    assert not graph.find_nodes(op="call_function", target=aten.clone.default)


# ------------------------------------------------------------------------------------------------------ ways round it


real = changed_inputs.snapshots


def _never(edit: Any) -> None:
    pass


def _rebuilt(edit: Any) -> None:
    """The copy may be made again in backward."""
    _with(edit, lambda n: n.meta.__setitem__("recompute", REBUILD))


def _untagged(edit: Any) -> None:
    _with(edit, lambda n: n.meta.pop("recompute"))


def _one_reader_left(edit: Any) -> None:
    def back(copied: Any) -> None:
        reader = next(u for u in copied.users if u.target is aten.mul.Tensor)
        reader.replace_input_with(copied, copied.args[0])

    _with(edit, back)


def _view_left(edit: Any) -> None:
    """A view of the input itself among what backward reads."""

    def back(copied: Any) -> None:
        with edit.graph.inserting_after(copied):
            view = edit.graph.call_function(aten.view.default, (copied.args[0], list(copied.meta["val"].shape)))
        view.meta["val"] = copied.meta["val"]
        copied.replace_all_uses_with(view)

    _with(edit, back)


def _only_in_backward(edit: Any) -> None:
    """Forward reads the input, and the partitioner leaves the copy to backward."""

    def back(copied: Any) -> None:
        needed = changed_inputs._Sides(edit.graph).forward
        for reader in [u for u in copied.users if u in needed and u.target is not aten.mul.Tensor]:
            reader.replace_input_with(copied, copied.args[0])

    _with(edit, back)


def _with(edit: Any, change: Callable[[Any], Any]) -> None:
    before = set(edit.graph.nodes)
    real(edit)
    for node in [n for n in edit.graph.nodes if n not in before]:
        change(node)


MUTANTS = [_never, _rebuilt, _untagged, _one_reader_left, _view_left, _only_in_backward]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_verify_finds_every_way_round_the_rule(mutant: Callable[..., Any]) -> None:
    case = joint.capture(filled(Stateful("B", WRITES["add"], READS["identity"], False)), x64())
    case.rewritten(form="weight")
    with patch.object(changed_inputs, "snapshots", mutant), pytest.raises(VerificationError, match="writes over"):
        case.rewritten(form="weight")


@pytest.mark.parametrize("mutant", MUTANTS)
def test_what_inductor_takes_away_is_looked_for_again(mutant: Callable[..., Any]) -> None:
    """Its joint passes remove copies: where none is made anew, the graph goes to Inductor untouched, with a warning."""
    module = filled(Stateful("B", WRITES["add"], READS["identity"], False))
    with patch.object(inductor_passes, "snapshots", mutant), pytest.warns(RuntimeWarning, match="writes over"):
        run(weight_form(module), module, (x64(),))
    assert peft_fx.explain(torch.compile(module, backend="peft_fx"), x64()).sites


def test_without_the_rule_gradients_are_wrong() -> None:
    """The oracle sees what verify guards against."""
    module = filled(Stateful("B", WRITES["add"], READS["identity"], False))
    off = {"snapshots": _never, "no_stale_reads": lambda graph: None}
    with patch.multiple(inductor_passes, **off), pytest.raises((AssertionError, RuntimeError)):
        as_eager(module)
