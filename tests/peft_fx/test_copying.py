"""Copies of models: whatever a module holds is copied, tensors are what they were to one another, and nothing of the
original is touched."""

from __future__ import annotations

import collections
import enum
import functools
import gc
import logging
import tempfile
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import peft_fx
from peft_fx import compat
from peft_fx.compat import pytree
from peft_fx.copying import Casts
from peft_fx.tracing import Ghosts, new_fake_mode
from tests.support.oracle import EAGER, WEIGHT
from tests.support.peft_models import fill, llama_config, tokens

K, N, R, T = 32, 24, 4, 64


class Adapted(nn.Module):
    """Its adapter's A is what `first` returns, which reads what `hold` has put somewhere."""

    def __init__(self, hold: Callable[[Any], None], first: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(N, K), requires_grad=False)
        self.A, self.B = nn.Parameter(torch.randn(R, K)), nn.Parameter(torch.randn(N, R))
        self.hold, self.first = hold, first
        hold(self)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W) + F.linear(F.linear(x, self.first(self)), self.B)


@dataclass
class Record:
    held: Any


@dataclass(frozen=True)
class Frozen:
    held: Any


@dataclass(frozen=True, slots=True)
class Slotted:
    held: Any


class Point(tuple):
    """As named tuples are."""


class Refusing(nn.Module):
    """No way of being copied that Python knows of."""

    def __init__(self, A: Tensor) -> None:
        super().__init__()
        self.A = A

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("not to be copied")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("not to be pickled")

    def __getstate__(self) -> Any:
        raise RuntimeError("no state")


class Itself(Refusing):
    def __deepcopy__(self, memo: Any) -> Any:
        return self


class Holder:
    """With a lock beside its tensor, so that it is neither pickled nor copied by `copy.deepcopy`."""

    def __init__(self, held: Any) -> None:
        self.held, self.lock = held, threading.Lock()

    def get(self) -> Any:
        return self.held


def closure(held: Any) -> Callable[[], Any]:
    return lambda: held


def set_(**attributes: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda m: [setattr(m, name, make(m)) for name, make in attributes.items()] and None


def weight_of(make: Callable[[nn.Linear], nn.Module]) -> tuple[Any, Any]:
    return set_(inner=lambda m: make(nn.Linear(K, R, bias=False))), lambda m: m.inner(torch.eye(K, dtype=m.B.dtype)).t()


HELD: dict[str, tuple[Callable[[Any], None], Callable[[Any], Tensor]]] = {
    "parameter": (set_(), lambda m: m.A),
    "view": (set_(v=lambda m: nn.Parameter.t(m.A)), lambda m: m.v.t()),
    "view of a part": (
        set_(big=lambda m: nn.Parameter(torch.randn(9, K)), v=lambda m: m.big[1 : R + 1]),
        lambda m: m.v,
    ),
    "view without gradients": (set_(v=lambda m: m.A.detach()[:1]), lambda m: m.A + m.v),
    "computed": (set_(v=lambda m: m.A * 2), lambda m: m.v),
    "other parameter of the same memory": (set_(P=lambda m: nn.Parameter(m.A.t())), lambda m: m.A + m.P.t()),
    "list": (set_(l=lambda m: [m.A]), lambda m: m.l[0]),
    "dict": (set_(d=lambda m: {"a": ({1: m.A},)}), lambda m: m.d["a"][0][1]),
    "ordered": (set_(d=lambda m: collections.OrderedDict(a=m.A)), lambda m: m.d["a"]),
    "deque": (set_(d=lambda m: collections.deque([m.A])), lambda m: m.d[0]),
    "set": (set_(z=lambda m: {m.A}), lambda m: next(iter(m.z))),
    "dataclass": (set_(d=lambda m: Record([m.A])), lambda m: m.d.held[0]),
    "frozen": (set_(d=lambda m: Frozen(m.A)), lambda m: m.d.held),
    "slots": (set_(d=lambda m: Slotted(m.A)), lambda m: m.d.held),
    "tuple": (set_(d=lambda m: Point([m.A])), lambda m: m.d[0]),
    "closure": (set_(f=lambda m: closure(m.A)), lambda m: m.f()),
    "default": (set_(f=lambda m: lambda a=m.A: a), lambda m: m.f()),
    "partial": (set_(f=lambda m: functools.partial(lambda a: a, m.A)), lambda m: m.f()),
    "bound method": (set_(f=lambda m: Holder(m.A).get), lambda m: m.f()),
    "object with a lock": (set_(h=lambda m: Holder(m.A)), lambda m: m.h.held),
    "module in a list": (set_(h=lambda m: [Refusing(m.A)]), lambda m: m.h[0].A),
    "module that refuses": (set_(h=lambda m: Refusing(m.A)), lambda m: m.h.A),
    "module that copies to itself": (set_(h=lambda m: Itself(m.A)), lambda m: m.h.A),
    "itself": (set_(me=lambda m: [m]), lambda m: m.me[0].A),
    "weak": (set_(me=lambda m: weakref.ref(m)), lambda m: m.me().A),
    "old weight_norm": weight_of(nn.utils.weight_norm),
    "weight_norm": weight_of(parametrizations.weight_norm),
    "old spectral_norm": weight_of(nn.utils.spectral_norm),
    "spectral_norm": weight_of(parametrizations.spectral_norm),
    "compiled layer": weight_of(lambda layer: torch.compile(layer, backend="eager")),
    "traced layer": weight_of(torch.fx.symbolic_trace),
}


def held(name: str) -> Adapted:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # weight_norm is an old one
        return Adapted(*HELD[name])


def reached(x: Any, seen: dict[int, Any] | None = None) -> Iterator[Any]:
    """All that can be reached from an object, however it is held."""
    todo, seen = [x], {}
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, (type, types.ModuleType)):
            continue
        seen[id(one)] = one
        if isinstance(one, weakref.ref):
            todo.append(one())
        if isinstance(one, types.FunctionType):
            todo += [one.__closure__, one.__defaults__, vars(one)]
        else:
            todo += gc.get_referents(one)
        if isinstance(one, Tensor):
            todo += [one._base]
            yield one


def ghost_of(x: Any) -> Any:
    return Ghosts(new_fake_mode(), "explain").of(x)


@pytest.mark.parametrize("name", HELD)
def test_no_tensor_of_a_ghost_is_real(name: str) -> None:
    """Wherever it is, and only there where the original has one; the original is what it was."""
    model = held(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ghost = ghost_of(model)
    there = list(reached(vars(ghost)))
    assert there
    assert all(isinstance(t, compat.FakeTensor) for t in there)
    assert not any(isinstance(t, compat.FakeTensor) for t in reached(vars(model)))
    own = dict(model.named_parameters(remove_duplicate=False))
    for n, p in ghost.named_parameters(remove_duplicate=False):
        original = own.get(n, own.get(n.replace("inner.", "inner._orig_mod.")))
        assert (p.shape, p.stride(), p.requires_grad) == (original.shape, original.stride(), original.requires_grad)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", HELD)
def test_a_cast_computes_the_same(name: str) -> None:
    """In float64, from tensors that are all its own, and where the original's parameters have a gradient, so have its
    own; but a tensor that was computed once and for all is not computed again."""
    model, x = held(name).eval(), torch.randn(T, K)
    exact = Casts(torch.float64)(model)
    want, got = model(x), exact(x.double())
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.float(), want, rtol=1e-4, atol=1e-3)
    for y in (want, got):
        y.sum().backward()
    both = list(zip(model.parameters(), exact.parameters(), strict=True))
    assert all((p.grad is None) == (q.grad is None) for p, q in both) is (name != "computed")
    assert all(p.untyped_storage().data_ptr() != q.untyped_storage().data_ptr() for p, q in both)


def test_ties_and_views_stay() -> None:
    """One tensor has one ghost, a view is one of its base's ghost, and what shares memory shares it."""
    A = nn.Parameter(torch.randn(R, K))
    B = nn.Parameter(A.t())
    with torch.no_grad():
        quiet = A[1:]
    given = {"A": A, "again": [A], "view": A[1:, 2:], "quiet": quiet, "computed": A * 2, "B": B, "detached": A.detach()}
    ghost = ghost_of(given)
    fake = ghost["A"]
    assert ghost["again"][0] is fake
    assert ghost["view"]._base is fake is ghost["quiet"]._base
    assert ghost["view"].storage_offset() == given["view"].storage_offset() > 0
    for name, x in given.items():
        if name != "again":
            assert (ghost[name].requires_grad, ghost[name].is_leaf) == (x.requires_grad, x.is_leaf), name
            assert isinstance(ghost[name], nn.Parameter) == isinstance(x, nn.Parameter)
            assert (ghost[name].shape, ghost[name].stride()) == (x.shape, x.stride())
    storages = [
        t.untyped_storage()._cdata for t in (fake, ghost["view"], ghost["quiet"], ghost["B"], ghost["detached"])
    ]
    assert len(set(storages)) == 1
    real = Casts(torch.float64)(given)
    with torch.no_grad():
        real["A"].fill_(3)
    assert all((real[name] == 3).all() for name in ("view", "quiet", "B", "detached"))
    real["view"].sum().backward()
    assert real["A"].grad is not None
    assert A.grad is None


def test_what_cannot_be_copied_is_shared() -> None:
    """Locks, generators, open files, threads, modules of Python, torch's functions: the very objects. What is closed
    when it goes is not closed by a copy that goes."""

    class Closing:
        closed = 0

        def __init__(self) -> None:
            self.held = torch.ones(2)

        def __del__(self) -> None:
            Closing.closed += 1

    class Kind(enum.Enum):
        ONE = 1

    with tempfile.NamedTemporaryFile() as file:
        same = {
            "lock": threading.Lock(),
            "generator": iter(i for i in range(3)),
            "file": file.file,
            "python": types,
            "function": torch.relu,
            "checkpoint": torch.utils.checkpoint.checkpoint,
            "op": torch.ops.aten.mm.default,
            "enum": Kind.ONE,
            "logger": logging.getLogger("peft_fx"),
            "mark": object(),
            "class": Closing,
            "sparse": torch.eye(3).to_sparse(),
            "memory": torch.ones(3).untyped_storage(),
            "pure": closure,
        }
        ghost = ghost_of({"same": same, "closing": Closing(), "temporary": file, "thread": threading.Thread()})
        assert all(ghost["same"][name] is x for name, x in same.items())
        assert isinstance(ghost["closing"], Closing)
        assert isinstance(ghost["closing"].held, compat.FakeTensor)
        gc.collect()
        Closing.closed = 0
        del ghost
        gc.collect()
        assert Closing.closed == 0
        assert Path(file.name).exists()


def test_what_a_hook_writes_to_is_its_own() -> None:
    """A list that a hook appends to, a counter of a function: the original's stay as they were."""
    seen: list[Any] = []
    count = 0

    def hook(module: Any, args: Any, output: Tensor) -> None:
        nonlocal count
        count += 1
        seen.append(output)

    model = held("parameter")
    model.register_forward_hook(hook)
    model.register_forward_hook(functools.partial(lambda kept, *args: kept.append(1), seen))
    report = peft_fx.explain(model, torch.randn(T, K), options=WEIGHT)
    assert [s.name for s in report.sites] == ["W"]
    assert seen == []
    assert count == 0


def test_what_is_too_deep_is_shared() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    assert isinstance(ghost_of({"deep": deep, "x": torch.ones(2)})["x"], compat.FakeTensor)


class Several(nn.Module):
    """One adapted layer for each of some kinds of things that a module may hold."""

    KINDS = "view of a part", "computed", "list", "closure", "bound method", "module that refuses"

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(held(name) for name in self.KINDS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers]).sum(0)


def test_explain_and_estimate_of_whatever_is_held() -> None:
    """Each layer is a site, and nothing is told otherwise than it is of the compile."""
    model, x = Several(), torch.randn(T, K)
    report = peft_fx.explain(model, x, options=WEIGHT)
    assert report.graph_breaks == report.refusals == []
    assert {s.name.split(".")[1] for s in report.sites} == {str(i) for i in range(len(model.layers))}
    assert all(s.forward == "weight" for s in report.sites)
    f = torch.compile(model, backend="peft_fx", options={**WEIGHT, "peft_fx.lowering": "aot_eager"})
    f(x).sum()
    assert sorted(map(str, peft_fx.explain(f).sites)) == sorted(map(str, report.sites))
    assert peft_fx.estimate(model, x, variants=["inductor", "peft_fx"]).rows


def test_a_size_that_is_marked_is_dynamic() -> None:
    """What is marked on a tensor is marked on its ghost."""
    x = torch.randn(T, K)
    torch._dynamo.mark_dynamic(x, 0)
    report = peft_fx.explain(held("parameter"), x, options=WEIGHT)
    assert any("[s" in line for line in report.nodes["W"]["before"]["forward"])


@pytest.fixture(scope="module")
def tied() -> tuple[nn.Module, dict[str, Tensor]]:
    """PEFT's adapters of tied embeddings, themselves tied."""
    import transformers as tf

    torch.manual_seed(0)
    config = llama_config(64, 96, 1)
    config.tie_word_embeddings = True
    targets = ["q_proj", "embed_tokens", "lm_head"]
    lora = LoraConfig(r=8, target_modules=targets, ensure_weight_tying=True, init_lora_weights=False)
    return get_peft_model(tf.LlamaForCausalLM(config), lora), {"input_ids": tokens(2, 64), "labels": tokens(2, 64)}


def test_tied_adapters_are_explained_and_estimated(tied: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, batch = tied
    report = peft_fx.explain(model, **batch, options=WEIGHT)
    assert len(report.sites) == 3
    assert report.refusals == report.graph_breaks == []
    assert len(peft_fx.estimate(model, variants=["inductor", "peft_fx"], **batch).rows) == 2


def test_tied_adapters_are_checked(tied: tuple[nn.Module, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64, of which the tied adapters have a copy."""
    model, batch = tied
    real = torch.compile
    eager = {"backend": "aot_eager"}
    monkeypatch.setattr(torch, "compile", lambda m, **kw: real(m, **(eager if "backend" not in kw else kw)))
    found = peft_fx.check(model, options={**EAGER, **WEIGHT}, **batch)
    assert found.ok, found
    assert found.reference == "float64"


def test_trainable_tokens_and_mixed_batches_are_traced() -> None:
    """Their models hold odd things too."""
    import transformers as tf

    batch = {"input_ids": tokens(2, 64), "labels": tokens(2, 64)}
    words = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]})
    model = get_peft_model(tf.LlamaForCausalLM(llama_config(64, 96, 1)), words)
    fill(model)
    assert any("q_proj" in s.name for s in peft_fx.explain(model, **batch, options=WEIGHT).sites)
    mixed = get_peft_model(tf.LlamaForCausalLM(llama_config(64, 96, 1)), LoraConfig(r=4, target_modules=["q_proj"]))
    mixed.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    assert peft_fx.explain(mixed.eval(), adapter_names=["default", "other"], **batch).graphs >= 1


def test_inputs_that_are_one_tensor_are_one() -> None:
    given = torch.ones(3)
    a, rest = ghost_of((given, {"b": [given, given[1:]]}))
    assert rest["b"][0] is a
    assert rest["b"][1]._base is a
    assert all(isinstance(t, compat.FakeTensor) for t in pytree.tree_leaves((a, rest)))
