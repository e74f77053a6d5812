"""`python -m peft_fx`: what it teaches, what it says when something is wrong, and explain from a configuration."""

from __future__ import annotations

import inspect
import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import peft_fx
from peft_fx.__main__ import main, parser
from peft_fx.cli import configs
from peft_fx.cli.terminal import Problem
from peft_fx.estimates import Estimate, Row
from peft_fx.passes import pipeline
from peft_fx.variants import LeftOut

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "vocab_size": 128}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No command asks the network for anything."""

    def refuse(*args: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A folder with the configuration of a Llama of one layer."""
    named = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    tf.LlamaConfig(**SMALL, num_hidden_layers=1, **named).save_pretrained(tmp_path)
    return tmp_path


# ------------------------------------------------------------------------------------------------------ what it teaches


def commands() -> list[str]:
    (group,) = (action for action in parser()._actions if isinstance(action.choices, dict))
    return list(group.choices or {})


@pytest.mark.parametrize("command", ["", *commands()])
def test_help_teaches_by_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each example is a call that the command itself takes; every exit status is told."""
    with pytest.raises(SystemExit) as left:
        main([*command.split(), "--help"])
    told = capsys.readouterr().out
    assert left.value.code == 0
    examples = [line.split("python -m peft_fx ")[1] for line in told.splitlines() if "  python -m peft_fx " in line]
    assert len(examples) >= 2
    for example in examples:
        words = example.partition("  ")[0].split()
        if "--help" not in words:
            parser().parse_args(words)
        assert words[0] == command or not command
    assert "exit status: 0" in told


def test_without_a_command_it_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    """And not only a line of usage."""
    with pytest.raises(SystemExit):
        main([])
    assert "examples:" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- what is wrong

PROBLEMS = {
    "no such file": (["nowhere.json"], "There is no file nowhere.json. Give the config.json"),
    "no configuration in the folder": (["."], "There is no file config.json. Give the config.json"),
    "not JSON": ([__file__], "transformers cannot read"),
    "a layer that is not there": (
        ["{llama}", "--targets", "kv_proj"],
        "no layer for --targets kv_proj. There are: down_pr",
    ),
    "no such option": (["{llama}", "--option", "from=weight"], "no option 'peft_fx.from'; valid ones: peft_fx.form"),
    "no such value": (["{llama}", "--option", "form=wieght"], "cannot be 'wieght'; valid values: 'auto', 'weight'"),
    "an option without a value": (["{llama}", "--option", "form"], "must be KEY=VALUE"),
    "no such machine": (["{llama}", "--machine", "z80"], "cannot be 'z80'; valid values: 'auto'"),
    "a page that cannot be written": (["{llama}", "--html", "{llama}"], "{llama} is a folder: name a file in it"),
    "a folder that is not there": (["{llama}", "--json", "no/r.json"], "There is no folder no to write r.json in"),
    "no such adapter": (["{llama}", "--diff", "conv"], "no adapter is called 'conv': base_model"),
}


@pytest.mark.parametrize("given", PROBLEMS, ids=lambda name: name.replace(" ", "_"))
def test_a_problem_is_told_with_what_to_do(
    given: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one message on stderr, no traceback, and the exit status is 2."""
    arguments, wanted = PROBLEMS[given]
    (llama / "empty").mkdir()
    monkeypatch.chdir(llama / "empty")
    status = main(["explain", *(word.format(llama=llama) for word in arguments), "--tokens", "64"])
    assert status == 2
    assert wanted.format(llama=llama) in capsys.readouterr().err


def test_a_model_of_pixels_is_turned_away(tmp_path: Path) -> None:
    """With the call to make instead."""
    tf.ViTConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(Problem, match=r"reads pixel_values.*\n.*\n.*peft_fx\.explain\(model"):
        configs.batch_of(configs.adapted_model(tmp_path), 64)


def test_a_decoder_without_a_first_token_is_turned_away(tmp_path: Path) -> None:
    """With the line that its configuration lacks."""
    tf.T5Config(**T5).save_pretrained(tmp_path)
    with pytest.raises(Problem, match='"decoder_start_token_id": 0'):
        configs.batch_of(configs.adapted_model(tmp_path), 64)


# ---------------------------------------------------------------------------------------------- a model from its config

T5 = {"num_layers": 1, "d_model": 64, "d_ff": 96, "num_heads": 2, "vocab_size": 128}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**SMALL, num_hidden_layers=1, architectures=["LlamaForCausalLM"]),
    "gpt2": lambda: tf.GPT2Config(n_layer=1, n_embd=64, n_head=2),  # names no architecture
    "roberta": lambda: tf.RobertaConfig(
        **SMALL, num_hidden_layers=1, architectures=["RobertaForSequenceClassification"]
    ),
    "t5": lambda: tf.T5Config(**T5, decoder_start_token_id=0),
}
LAYERS = {"llama": (7, 4), "gpt2": (4, 2), "roberta": (8, 4), "t5": (16, 12)}  # all linear ones, attention's
LABELS = {"roberta": (2,)}


@pytest.mark.parametrize("targets", ["all-linear", "attention"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_built_of_nothing(name: str, targets: str, tmp_path: Path) -> None:
    """On the meta device, frozen but for LoRA on each layer asked for; with a batch of what its call takes."""
    MODELS[name]().save_pretrained(tmp_path)
    model = configs.adapted_model(tmp_path / "config.json", rank=4, targets=targets, dtype="float16")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.float16}
    adapters = {n for n, p in model.named_parameters() if p.requires_grad and "lora_A" in n}
    assert len(adapters) == LAYERS[name][targets == "attention"]
    batch = configs.batch_of(model, tokens=32, batch=2)
    inspect.signature(model.get_base_model().forward).bind(**batch)
    assert {k: tuple(v.shape) for k, v in batch.items()} == {"input_ids": (2, 32), "labels": LABELS.get(name, (2, 32))}
    assert model.training


def test_one_layer_by_name(llama: Path) -> None:
    """Names with commas between; the dtype is the configuration's own."""
    model = configs.adapted_model(llama, rank=4, targets="q_proj, down_proj")
    trained = {n.split(".lora_")[0].rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "down_proj"}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


# ------------------------------------------------------------------------------------------------------------- explain


def test_explain_writes_what_is_asked_for(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table to stdout, progress to stderr, a page and JSON to files, which agree."""
    page, data = llama / "report.html", llama / "report.json"
    asked = ["--tokens", "64", "--option", "form=weight", "--loss-only", "--html", str(page), "--json", str(data)]
    assert main(["explain", str(llama), "--rank", "4", *asked]) == 0
    out, err = capsys.readouterr()
    report = json.loads(data.read_text())
    assert len(report["sites"]) == 7
    assert {s["rank"] for s in report["sites"]} == {4}
    assert {s["tokens"] for s in report["sites"]} == {64}
    assert report["refusals"] == []
    assert out.startswith("7 of 7 adapters in weight form; 1 graph")
    for site in report["sites"]:
        assert site["name"] in out
        assert site["name"] in page.read_text()
    assert f"wrote {page}" in err
    assert "building the model without its weights" in err


def test_a_pass_that_fails_is_the_exit_status(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """1, and the table says what is left to Inductor."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(pipeline, "run", fail)
    assert main(["explain", str(llama), "--tokens", "64"]) == 1
    assert "left to Inductor untouched: RuntimeError: on purpose" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- estimate from a configuration


def test_an_estimate_is_one_on_however_many_processors(llama, monkeypatch, capsys) -> None:
    asked = ["estimate", str(llama), "--seq", "64:128", "--machine", "h100", "--variants", "full,frozen"]
    told = []
    for processors in ({0}, {0, 1}):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, found=processors: found)
        assert main(asked) == 0
        told.append(capsys.readouterr())
    assert told[0].out == told[1].out
    assert told[0].out.count("\nfull ") == told[0].out.count("\nfrozen ") == 2
    assert all(sorted(told[1].err.splitlines()) == sorted(each.err.splitlines()) for each in told)


def test_a_budget_says_what_fits_in_it(llama, monkeypatch, capsys) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    asked = ["estimate", str(llama), "--seq", "64:128", "--machine", "h100", "--variants", "peft_fx,peft_fx-budget"]
    assert main([*asked, "--budget", "80GB"]) == 0
    told = capsys.readouterr().out
    assert told.count("\npeft_fx-budget ") == 2
    assert re.search(r"T that fits in 80 GB: peft_fx \d+, peft_fx-budget \d+", told)
    for wrong in ("0.9", "auto", "a lot"):
        with pytest.raises(SystemExit) as stopped:
            main([*asked, "--budget", wrong])
        assert stopped.value.code == 2
        assert "as 9MB or 24GB" in capsys.readouterr().err
    assert main([*asked, "--option", "memory_budget=0.9"]) == 2
    assert "24GB" in capsys.readouterr().err


def test_what_a_model_does_not_allow_is_left_out_unless_it_is_asked_for(llama, monkeypatch, capsys) -> None:
    def estimate(model: Any, variants: list[str], **kwargs: Any) -> Estimate:
        if variants == ["full"]:
            raise LeftOut("full: all of it is frozen") from LeftOut("all of it is frozen")
        return Estimate([Row(name, 64, 1, 1, 1, 1, 1, 1.0) for name in variants], "h100")

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    monkeypatch.setattr(peft_fx, "estimate", estimate)
    assert main(["estimate", str(llama)]) == 0
    told = capsys.readouterr().out
    assert "full is left out: all of it is frozen" in told
    assert "frozen " in told
    assert main(["estimate", str(llama), "--variants", "full,frozen"]) == 2
    assert "full: all of it is frozen" in capsys.readouterr().err
