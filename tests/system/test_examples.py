"""Every example runs as it is, prints its losses, and has its adapters rewritten."""

from __future__ import annotations

import ast
import pathlib
import re
import runpy
import sys
from dataclasses import replace

import pytest
import torch

from peft_fx import compiling, explaining
from peft_fx.options import Options, parse

EXAMPLES = sorted((pathlib.Path(__file__).parents[2] / "examples").glob("*.py"))
STEPS = 2
NEEDS = {"sft_trainer": "trl", "diffusers_lora": "diffusers"}


def op_by_op(*args) -> Options:
    """What torch.compile was given, with ATen ops in the place of compiled code."""
    return replace(parse(*args), lowering="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: pathlib.Path, monkeypatch, capsys) -> None:
    """In a job of one process, where it is one for several."""
    pytest.importorskip(NEEDS.get(example.stem, "torch"))
    for module in (compiling, explaining):
        monkeypatch.setattr(module, "parse", op_by_op)
    job = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, number in job.items() if example.stem == "fsdp2" else ():
        monkeypatch.setenv(name, number)
    monkeypatch.setattr(sys, "argv", [str(example), "--steps", str(STEPS)])
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    assert len(re.findall(r"^(?:step \d+: loss|\{'loss':) ", printed, re.MULTILINE)) == STEPS
    ((rewritten, adapters),) = re.findall(r"^(\d+) of (\d+) adapters in weight form", printed, re.MULTILINE)
    assert int(adapters) >= int(rewritten) >= 8
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_says_how_to_run_it(example: pathlib.Path) -> None:
    """One command, in its first lines."""
    told = ast.get_docstring(ast.parse(example.read_text())) or ""
    (command,) = re.findall(r"^    (?:python|torchrun --nproc-per-node 2) (\S+) \[--steps 20\]$", told, re.MULTILINE)
    assert command == f"examples/{example.name}"
