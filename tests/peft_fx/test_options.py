"""Options: what is wrong, what goes on to Inductor, users' own passes beside ours."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import peft_fx
from peft_fx import compat, compiling
from peft_fx.options import CHOICES, parse
from peft_fx.passes import pipeline
from peft_fx.passes.findings import Outcome
from tests.support.spellings import Stack, x
from tests.support.stepping import Noting, T, step

KEYS = [f"peft_fx.{key}" for key in CHOICES]
WRONG = {
    "unknown_key": ("peft_fx.from", "weight", KEYS),
    "prefix_alone": ("peft_fx.", "weight", KEYS),
    "key_in_capitals": ("peft_fx.Form", "weight", KEYS),
    **{f"value_of_{key}": (f"peft_fx.{key}", "nonsense", valid) for key, valid in CHOICES.items()},
    "memory_weight_below_0": ("peft_fx.memory_weight", -1.0, ["seconds"]),
    "memory_weight_a_name": ("peft_fx.memory_weight", "much", ["seconds"]),
    "dense_where_strict": ("peft_fx.adapter_grad", "dense", ["auto", "low_rank"]),
    "value_none": ("peft_fx.form", None, CHOICES["form"]),
    "value_unhashable": ("peft_fx.form", ["weight"], CHOICES["form"]),
}


@pytest.mark.parametrize(("key", "chosen", "valid"), WRONG.values(), ids=WRONG)
def test_wrong_option_is_a_value_error(key: str, chosen: Any, valid: list[str]) -> None:
    """Beside right options too; the error says what was wrong and names each key or value that is right."""
    with pytest.raises(ValueError, match="valid") as caught:
        parse({"peft_fx.numerics": "strict", "max_autotune": True, key: chosen})
    assert repr(key) in str(caught.value)
    assert all(str(name) in str(caught.value) for name in valid)


@pytest.mark.parametrize(
    "arguments",
    [
        {"options": {"peft_fx.from": 1}},
        {"options": {"peft_fx.form": "wieght"}},
        {"options": {"form": "weight"}},
        {"mode": "lite"},
    ],
)
def test_wrong_option_is_told_through_torch_compile(arguments: dict) -> None:
    """Dynamo wraps what a backend raises; the ValueError is inside, its text on top."""
    f = torch.compile(Stack(), backend=peft_fx.backend, **arguments)
    with pytest.raises(BackendCompilerFailed, match="peft_fx") as caught:
        f(*x(*T)())
    assert type(caught.value.inner_exception) is ValueError
    assert str(caught.value.inner_exception) in str(caught.value)


NEAREST = {
    "form": "peft_fx.form",
    "Form": "peft_fx.form",
    "fomr": "peft_fx.form",
    "keep_layer": "peft_fx.keep_layers",
    "peft_fx.frm": "peft_fx.form",
    "peft_fx_form": "peft_fx.form",
    "peftfx.keep": "peft_fx.keep",
    "max_autotun": "max_autotune",
    "peft_fx.max_autotune": "max_autotune",
    "triton.cudagraph": "triton.cudagraphs",
}


@pytest.mark.parametrize(("key", "meant"), NEAREST.items())
def test_a_key_that_is_nearly_right(key: str, meant: str) -> None:
    """Without the prefix, or misspelt, ours or Inductor's: the error asks for the nearest."""
    with pytest.raises(ValueError, match=f"no option {key!r}; valid ones: .*did you mean .*{meant!r}"):
        parse({key: "weight"})


@pytest.mark.parametrize("key", ["lora", 3, None])
def test_a_key_that_nothing_is_near_to(key: Any) -> None:
    with pytest.raises(ValueError, match=r"valid ones: peft_fx\.form, ") as caught:
        parse({key: 1})
    assert "did you mean" not in str(caught.value)


def test_keys_of_inductor_are_taken_as_torch_compile_takes_them() -> None:
    """Dotted, private, with dashes."""
    given = {"triton.cudagraphs": False, "_micro_pipeline_tp": False, "max-autotune": True, "fallback_random": True}
    assert parse(given).inductor == {k.replace("-", "_"): v for k, v in given.items()}


def test_mode_lite_is_a_value_error() -> None:
    """It runs no joint-graph passes."""
    with pytest.raises(ValueError, match="lite"):
        parse(None, "lite")


def seen_by_inductor(monkeypatch: pytest.MonkeyPatch, names: list[str], **arguments: Any) -> dict[str, Any]:
    """Inductor's configuration while the passes run in a compile that stops before code generation."""
    seen: dict[str, Any] = {}
    lower, passes = compat.compile_fx, pipeline.run

    def look(*args: Any) -> Outcome:
        seen.update({name: attrgetter(name)(compat.inductor_config) for name in names})
        return passes(*args)

    monkeypatch.setattr(pipeline, "run", look)
    monkeypatch.setattr(compat, "compile_fx", lambda *a, **kw: lower(*a, inner_compile=compiling._run_eagerly, **kw))
    torch.compile(Stack(), backend=peft_fx.backend, **arguments)(*x(*T)())
    return seen


MODES = ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


@pytest.mark.parametrize("mode", MODES)
def test_mode_is_mapped_as_inductor_does(mode: str, monkeypatch) -> None:
    """The passes run under the very configuration that Inductor lists for the mode."""
    wanted = compat.list_mode_options(mode)
    assert wanted
    assert seen_by_inductor(monkeypatch, list(wanted), mode=mode) == wanted


def test_other_options_reach_inductor(monkeypatch) -> None:
    """Keys without our prefix are Inductor's, dotted ones too; ours do not get there."""
    theirs = {"max_autotune": True, "triton.cudagraphs": True, "epilogue_fusion": False}
    assert not any(attrgetter(k)(compat.inductor_config) == v for k, v in theirs.items())
    assert seen_by_inductor(monkeypatch, list(theirs), options={"peft_fx.form": "weight", **theirs}) == theirs
    assert parse({"peft_fx.form": "weight", **theirs}).inductor == theirs


def test_an_option_overrides_the_mode() -> None:
    """Where a backend is called with both, the option given by name wins."""
    chosen = parse({"triton.cudagraphs": False}, "reduce-overhead")
    assert chosen.inductor == {**compat.list_mode_options("reduce-overhead"), "triton.cudagraphs": False}


def test_a_users_own_pass_still_runs() -> None:
    """A pass given by option, by configuration, or as one of a list sees the graph before us, and once."""
    theirs = Noting()
    step(joint_custom_pre_pass=theirs)
    with compat.inductor_config.patch(joint_custom_pre_pass=theirs):
        _, f = step()
    assert len(theirs.seen) == 2
    assert theirs.seen[0] == theirs.seen[1] >= 12
    assert len(peft_fx.explain(f).sites) == 2


def test_a_list_of_passes_still_runs() -> None:
    """Inductor of 2.13 takes a list of joint passes as well."""
    theirs = Noting()
    _, f = step(joint_custom_pre_pass=[theirs, theirs])
    assert len(theirs.seen) == 2
    assert len(peft_fx.explain(f).sites) == 2


def test_a_pass_after_inductors_still_runs() -> None:
    theirs = Noting()
    step(joint_custom_post_pass=theirs)
    assert len(theirs.seen) == 1


def test_a_removed_no_op_leaves_its_tag_to_nobody() -> None:
    """Inductor hands the metadata of `1.0 * A`, which backward rebuilds, on to A, which is then not kept for it."""
    x, W, W2 = (torch.randn(*sizes).double() for sizes in ((2, 5), (5, 8), (5, 5)))
    A, B, A2, B2 = (nn.Parameter(torch.randn(*sizes).double()) for sizes in ((5, 3), (3, 8), (5, 2), (2, 5)))

    def f(x):
        return x @ W + ((1.0 * x) @ A) @ B, x @ W2 + ((2.0 * x) @ A2) @ B2

    options = {"peft_fx.lowering": "aot_eager", "peft_fx.form": "weight"}
    compiled = torch.compile(f, backend="peft_fx", options=options)
    got, want = (torch.autograd.grad(sum(y.sum() for y in g(x)), [A, B, A2, B2]) for g in (compiled, f))
    torch.testing.assert_close(got, want)
