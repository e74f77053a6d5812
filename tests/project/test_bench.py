"""`python -m bench`: what is committed is what it asks for, and what the docs tell is made of that."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from torch._functorch import config as functorch_config

from bench import report, variants
from bench.__main__ import main, parser
from bench.experiment import DOCS, Command, Experiment, Session, in_a_worker, publish
from bench.experiments import COMMANDS, KINDS, compiling
from bench.results import FOLDER, Results, request
from zoo.models import make_base, make_batch, setup_of


def experiments(commands: Any = COMMANDS, group: tuple[str, ...] = ()) -> Iterator[tuple[str, Experiment]]:
    for command in commands:
        path = (*group, command.name)
        if isinstance(command, Experiment):
            yield " ".join(path), command
        yield from experiments(command.members, path)


EXPERIMENTS = dict(experiments())
REPORTED = [name for name, e in EXPERIMENTS.items() if e.page and e.file.exists()]


@pytest.mark.parametrize("words", [name.split() for name in (*EXPERIMENTS, "suite", "study", "report")], ids=" ".join)
def test_every_command_has_help(words: list[str], capsys: pytest.CaptureFixture) -> None:
    """With its first line in the list of commands."""
    with pytest.raises(SystemExit, match="0"):
        parser().parse_args([*words, "--help"])
    assert len(capsys.readouterr().out.splitlines()) > 5


class Asked(Session):
    """Measures nothing."""

    def measure(self, requests: Any, by: Any = None, only: Any = None) -> Any:
        self.requests = list(requests if only is None else only)
        raise StopIteration


def requests_of(words: str, tmp_path: Path) -> list[dict[str, Any]]:
    args = parser().parse_args([*words.split(), "--output", str(tmp_path / "none.json")])
    session = Asked(Results(args.output, "cpu"), True)
    with pytest.raises(StopIteration):
        EXPERIMENTS[words.partition(" --")[0]].measured(args, session)
    return json.loads(json.dumps(session.requests))


@pytest.mark.parametrize(
    "words",
    [
        *("suite cpu", "suite methods", "suite loss --device cpu", "suite gpu --toy --device cpu"),
        *("estimate", "long-context", "study rounding", "study keep", "compile"),
        pytest.param("kernels", marks=pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")),
    ],
)
def test_what_is_committed_is_what_is_asked_for(words: str, tmp_path: Path) -> None:
    """Every row has a request: one that changes would leave its results behind, to be dropped."""
    name = words.partition(" --")[0].split()[-1] + ("-toy" if "--toy" in words else "")
    asked = requests_of(words, tmp_path)
    rows = json.loads((FOLDER / f"{name}.json").read_text())["rows"]
    assert rows
    assert all(any(all(row.get(k) == v for k, v in a.items()) for a in asked) for row in rows)


@pytest.mark.parametrize("name", REPORTED)
def test_pages_have_the_tables_of_the_results(name: str, tmp_path: Path) -> None:
    """To the byte."""
    experiment = EXPERIMENTS[name]
    results = Results(experiment.file, "cpu")
    made = {mark: table(results.rows, "github") for mark, table in experiment.tables.items()}
    page = Path(shutil.copy(DOCS / experiment.page, tmp_path))
    before = page.read_text()
    assert all(f"<!-- bench: {mark} -->" in before for mark, table in made.items() if table)
    publish(page, experiment.name, made, results.runs)
    assert page.read_text() == before


def test_the_suites_tables_are_of_the_results(tmp_path: Path) -> None:
    """Those that `report` makes."""
    page = Path(shutil.copy(DOCS / "benchmarks.md", tmp_path))
    before = page.read_text()
    for name in (*report.KNOWN, report.AVX2):
        if (path := FOLDER / f"{name}.json").exists():
            content = json.loads(path.read_text())
            made = {mark: table(content["rows"]) for mark, table in report.PAGE_TABLES[name].items()}
            assert all(made.values())
            publish(page, name, made, content["runs"])
    assert page.read_text() == before
    known = [path for name in (*report.KNOWN, report.AVX2) if (path := FOLDER / f"{name}.json").exists()]
    sections = [report.section(path.stem, json.loads(path.read_text())) for path in known]
    assert (FOLDER / "tables.md").read_text() == "\n".join(sections)


def test_what_is_known_is_not_measured_again(tmp_path: Path) -> None:
    """Unless that is asked for; rows of what is not asked for any longer go."""
    path, calls = tmp_path / "some.json", []

    def answer(asked: Any, say: Any) -> dict[str, Any]:
        calls.append(asked["n"])
        return {"square": asked["n"] ** 2}

    asked = [{"kind": "some", "variants": ["peft_fx"], "n": n} for n in (1, 2, 3)]
    Session(Results(path, "cpu"), False).measure(asked[:2], answer)
    rows = Session(Results(path, "cpu"), False).measure(asked, answer)
    assert (calls, [row["square"] for row in rows]) == ([1, 2, 3], [1, 4, 9])
    Session(Results(path, "cpu"), True).measure(asked[2:], answer, only=asked[1:])
    assert (calls[3:], [row["n"] for row in Results(path, "cpu").rows]) == ([3], [2, 3])
    assert Session(Results(path, "cpu"), True, end=0.0).measure(asked, answer) == []


@pytest.mark.slow
def test_a_worker_that_fails_says_so(capfd: pytest.CaptureFixture) -> None:
    """What it raised is the row, and shown."""
    said: list[str] = []
    setup = setup_of("llama-tiny", layers=1, device="cpu")
    row = in_a_worker(request("memory", setup, ["no such variant"], depths=[1]), said.append)
    assert (row, said) == ({"error": "KeyError"}, ["1 layers"])
    assert "no such variant" in capfd.readouterr().err


def test_a_choice_is_timed_beside_the_partitioner() -> None:
    """Of which it is a share: all three are CPU seconds."""
    setup = setup_of("llama-256", layers=1, hidden=64, tokens=64, vocab=64, dtype="fp32", device="cpu")
    found = compiling.compile({"setup": asdict(setup), "form": "auto", "budget": 0.95}, lambda text: None)
    assert found["choice_s"] > 0 < found["partitioner_s"]
    assert found["held"]["peak"]["after"] < found["held"]["peak"]["before"]


@pytest.mark.parametrize("backend", ["inductor", "peft_fx"])
def test_a_budget_of_pytorchs_is_not_anothers_code(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo gives a copy of a model the code that it had an equal backend make: copies with other budgets too."""
    seen = []

    def plain(gm: Any, inputs: Any) -> Any:
        seen.append(functorch_config.activation_memory_budget)
        return gm.forward

    monkeypatch.setattr(variants, "compile_fx", plain)
    monkeypatch.setattr(variants.peft_fx, "backend", plain)
    setup = setup_of("llama-tiny", layers=1, tokens=16)
    base, batch = make_base(setup), make_batch(setup)
    for share in (0.5, 0.2):
        variants.make(f"{backend}@{share}", copy.deepcopy(base), setup, batch).loss()
    assert seen == [0.5, 0.2]


def test_what_is_missing_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["sweep", "--report", "--output", str(tmp_path / "none.json")]) == 2
    assert "no results" in capsys.readouterr().err


def test_every_kind_is_answered_once() -> None:
    assert set(KINDS) == {"memory", "step", "compile", "kernels", "sweep", "rehearsal"}
    assert all(isinstance(command, Command) for command in COMMANDS)
