"""`python -m peft_fx demo`: its dtype, what it says first, and that what it says is what was measured."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from peft_fx import machines, measuring
from peft_fx.__main__ import parser
from peft_fx.cli import demo
from peft_fx.cli.demo import EAGER, FROZEN, INDUCTOR, OURS, Cost
from peft_fx.cli.terminal import Problem
from peft_fx.measuring import Memory
from peft_fx.passes.decide.machine import MACHINES

CPU = torch.device("cpu")
ROUNDS = [0.10, 0.12, 0.30, 0.11, 0.10]  # one of them beside something else


def args(*words: str) -> Any:
    return parser().parse_args(["demo", *words])


def costs(inductor: float, eager: float) -> dict[str, Cost]:
    """Ours keeps 5 MB in the rounds above; the others so many times as long, in each of them."""
    kept = {EAGER: 15, INDUCTOR: 10, OURS: 5, FROZEN: 5}
    longer = {EAGER: eager, INDUCTOR: inductor, OURS: 1.0, FROZEN: 0.9}
    return {n: Cost(Memory(k * 10**6, 2 * k * 10**6), [longer[n] * t for t in ROUNDS]) for n, k in kept.items()}


@pytest.mark.parametrize(("name", "dtype"), [("cpu", torch.bfloat16), ("avx2", torch.float32)])
def test_the_dtype_is_one_that_the_cpu_multiplies(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    """And it is said where that is not bfloat16, with the option that asks for it."""
    monkeypatch.setattr(machines, "found", lambda device: MACHINES[name])
    chosen, why = demo.dtype_for(args(), CPU)
    assert chosen == dtype
    assert ("--dtype" in why and "38 times as fast" in why) is (name == "avx2")
    for asked in (torch.bfloat16, torch.float32):
        assert demo.dtype_for(args("--dtype", str(asked).removeprefix("torch.")), CPU) == (asked, "")


@pytest.mark.parametrize(
    ("inductor", "said"),
    [
        (1.0, "the same time as by Inductor"),
        (1.04, "the same time as by Inductor"),
        (0.96, "the same time as by Inductor"),
        (1.25, "0.80 times as long as by Inductor"),
        (0.8, "1.25 times as long as by Inductor"),
    ],
)
def test_the_sentence_says_what_was_measured(inductor: float, said: str) -> None:
    """Memory and time against PEFT in eager mode and by Inductor; what differs by less than 5 % is the same."""
    sentence = " ".join(demo.in_a_sentence(costs(inductor, 2.0)).split())
    assert "keeps 5.0 MB" in sentence
    assert "PEFT by Inductor keeps 2 times as much (10.0 MB)" in sentence
    assert "PEFT in eager mode 3 times as much (15.0 MB)" in sentence
    assert f"a step takes {said}, and 0.50 times as long as in eager mode." in sentence


def test_a_difference_is_that_of_the_rounds() -> None:
    """Each had a step of both: one that all were slow in changes nothing."""
    ours, other = Cost(Memory(1, 1), [1.0, 9.0, 1.0]), Cost(Memory(1, 1), [2.0, 18.0, 2.1])
    assert ours.times_longer(other) == 0.5
    assert measuring.quartiles([5.0, 1.0, 2.0, 9.0, 3.0, 4.0, 8.0]) == (2.0, 8.0)
    taken = measuring.times_in_turn({"a": lambda: None, "b": lambda: None}, CPU, rounds=3)
    assert {name: len(t) for name, t in taken.items()} == {"a": 3, "b": 3}


def test_the_sentence_comes_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Then the table of costs with the spread of the rounds, then the adapters, then the losses."""
    monkeypatch.setattr(demo, "require", lambda *names: None)
    monkeypatch.setattr(demo, "silence_others", lambda: None)
    monkeypatch.setattr(demo, "_missing_compiler", lambda: "")
    monkeypatch.setattr(demo, "_progress", lambda: contextlib.nullcontext())
    variant = demo.Variant(torch.nn.Linear(2, 2), lambda **inputs: None)
    monkeypatch.setattr(demo, "make_variants", lambda *given: dict.fromkeys((EAGER, INDUCTOR, OURS, FROZEN), variant))
    monkeypatch.setattr(demo, "compile_all", lambda *given: {INDUCTOR: 40.0, OURS: 50.0, FROZEN: 20.0})
    monkeypatch.setattr(demo, "train", lambda *given: [3.0, 2.0])
    monkeypatch.setattr(demo, "measure", lambda *given: costs(1.0, 2.0))
    monkeypatch.setattr(demo.peft_fx, "explain", lambda model: "the adapters")
    assert demo.run(args("--steps", "2", "--tokens", "8")) == 0
    told = capsys.readouterr().out
    order = ["For backward peft_fx keeps", "1. What a training step costs", "the adapters", "3. Losses"]
    assert sorted(order, key=told.index) == order
    assert "100.0 … 120.0" in told


def test_a_budget_is_one_more_variant() -> None:
    """Of bytes alone: of a part of the device's memory a step of the demo's size would know nothing."""
    asked = args("--budget", "18MB", "--layers", "1", "--hidden", "64", "--tokens", "8")
    assert asked.budget == 18_000_000
    found = demo.make_variants(asked, CPU, torch.float32)
    assert list(found) == [EAGER, INDUCTOR, OURS, FROZEN, demo.WITHIN]
    assert len({id(variant.model) for variant in found.values()}) == 5
    assert list(demo.make_variants(args("--layers", "1"), CPU, torch.float32)) == [EAGER, INDUCTOR, OURS, FROZEN]
    for wrong in ("0.9", "auto", "-3MB", "much"):
        with pytest.raises(SystemExit):
            args("--budget", wrong)


def test_nothing_is_compared_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch._dynamo.config.patch(disable=True), pytest.raises(Problem, match="TORCHDYNAMO_DISABLE"):
        demo.run(args())
    monkeypatch.setenv("PEFT_FX_DISABLE", "1")
    with pytest.raises(Problem, match="PEFT_FX_DISABLE"):
        demo.run(args())


@pytest.mark.parametrize("compiled", [False, True])
def test_kept_tensors_are_what_is_kept(compiled: bool) -> None:
    """By dtype and shape; of a parameter and of a second view of a value nothing is told."""
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Sigmoid(), torch.nn.Linear(16, 4))
    call = torch.compile(layers, backend="aot_eager") if compiled else layers
    x = torch.randn(3, 8)
    found = measuring.kept_tensors(call(x).sum(), layers)
    told = {(t["dtype"], tuple(t["shape"])): (t["count"], t["bytes"]) for t in found}
    assert told == {("float32", (3, 16)): (1, 3 * 16 * 4), ("float32", (3, 8)): (1, 3 * 8 * 4)}
