"""The one shape of all that is measured here: a command, what it measures, and what is made of the rows.

Each measurement is taken in a fresh process where nothing else is said, with a progress bar on stderr.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
import traceback
import warnings
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.results import FOLDER, ROOT, Results, asked, provenance
from peft_fx.cli.terminal import Problem, silence_others

Request = Mapping[str, Any]
Row = dict[str, Any]
Say = Callable[[str], None]
Kind = Callable[[Request, Say], Row]  # answers requests of one kind, and says how far it is
SPAWN = get_context("spawn")
DESCRIBED = ("model", "tokens", "dtype", "dropout", "K", "N", "r", "rate", "seed", "task", "targets", "table", "name")
DOCS = ROOT.parent / "docs"
Argument = tuple[tuple[str, ...], dict[str, Any]]
Table = Callable[[Sequence[Any], str], str]  # of rows, in a style of tabulate's; empty where they do not make one


def option(*names: str, **settings: Any) -> Argument:
    """An argument of a command, as `add_argument` takes it."""
    return names, settings


DEVICE = option("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
RESUME = option("--resume", action="store_false", dest="again", help="keep what was measured before, and is the same")
FRESH = option("--fresh", action="store_true", dest="again", help="measure everything again")
REPORT = option("--report", action="store_true", help="measure nothing: tables and figure of what is there")


@dataclass(frozen=True, kw_only=True)
class Command:
    """A sub-command of `python -m bench`; with `members`, the name of several: `python -m bench suite cpu`.

    `text` is its help, the first line that in the list of commands.
    """

    name: str
    text: str
    arguments: Sequence[Argument] = ()
    members: Sequence[Command] = ()

    def declared(self) -> Sequence[Argument]:
        return self.arguments

    def add_to(self, commands: Any) -> None:
        """Adds it to the sub-commands of an argument parser."""
        told = {"help": self.text.splitlines()[0].rstrip(".:"), "description": self.text}
        added: ArgumentParser = commands.add_parser(self.name, **told, formatter_class=RawDescriptionHelpFormatter)
        added.set_defaults(run=self.run)
        for names, settings in self.declared():
            added.add_argument(*names, **settings)
        if self.members:
            inside = added.add_subparsers(title=self.name, metavar=self.name, required=True)
            for member in self.members:
                member.add_to(inside)

    def run(self, args: Namespace) -> None:
        """Raises a Problem where something that it needs is missing."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Experiment(Command):
    """A command that measures. Results are in bench/results/<name>.json, a figure in a PNG beside them.

    `measured` gives rows, by a session. Of these, or of what they are `read` as, `tables` are made and printed, then
    `more`; where all that is committed was measured, those of a `page` of docs/ are put between its marks of their
    names. `kinds` answer the requests that go to a process of their own. `fresh`: what is known is measured again,
    unless --resume. `threads`: 0 for all.
    """

    measured: Callable[[Namespace, Session], Sequence[Row]]
    tables: Mapping[str, Table] = field(default_factory=dict)
    more: Callable[[Namespace, Sequence[Any]], Iterable[str]] = lambda args, rows: ()
    read: Callable[[Namespace, Sequence[Row]], Sequence[Any]] = lambda args, rows: rows
    page: str = ""
    figure: Callable[[Sequence[Any], Path], None] | None = None
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    fresh: bool = True
    threads: int = 0

    def declared(self) -> Sequence[Argument]:
        output = option("--output", type=Path, metavar="FILE", help=f"(default: {self.file.relative_to(ROOT.parent)})")
        page = option("--page", type=Path, metavar="FILE", help=f"for the tables (default: docs/{self.page})")
        report = [REPORT] if self.page or self.figure else []
        return [*self.arguments, RESUME if self.fresh else FRESH, *report, *[page] * bool(self.page), output]

    @property
    def file(self) -> Path:
        return FOLDER / f"{self.name}.json"

    def run(self, args: Namespace) -> None:
        if threads := getattr(args, "threads", self.threads):
            torch.set_num_threads(threads)
        results = Results(args.output or self.file, device_of(args))
        rows = results.rows
        if not getattr(args, "report", False):
            minutes = getattr(args, "minutes", 0) or float("inf")
            rows = self.measured(args, Session(results, args.again, time.monotonic() + 60 * minutes))
        if not rows or not (rows := self.read(args, rows)):
            raise Problem(f"There are no results in {results.path} yet: measure some first, without --report")
        told = [*(table(rows, "simple") for table in self.tables.values()), *self.more(args, rows)]
        print("\n\n".join(["", *filter(None, told)]))
        of_some = getattr(args, "model", None)
        if self.page and (args.page or not (args.output or of_some)):
            made = {name: table(rows, "github") for name, table in self.tables.items()}
            publish(args.page or DOCS / self.page, self.name, made, results.runs)
        if self.figure and not of_some:
            self.figure(rows, results.path.with_suffix(".png"))


def device_of(args: Namespace) -> str:
    return getattr(args, "device", "cpu") or ("cuda" if torch.cuda.is_available() else "cpu")


def publish(page: Path, name: str, made: Mapping[str, str], runs: Iterable[Row]) -> None:
    """Puts tables between a page's marks of their names, each with where its numbers come from; of a page with a mark
    for that, `<name> runs`, all of them there."""
    text, told = page.read_text(), list(map(provenance, runs))
    apart = f"{name} runs"
    once = f"<!-- bench: {apart} -->" in text
    text = _between(text, apart, "\n\n".join(told))
    for mark, table in made.items():
        if table:
            text = _between(text, mark, "\n\n".join([table, *([] if once else told)]))
    page.write_text(text)


def _between(text: str, name: str, body: str) -> str:
    """The page with what is between the marks of a name replaced."""
    before, mark, rest = text.partition(f"<!-- bench: {name} -->")
    return f"{before}{mark}\n{body}\n<!-- end -->{rest.partition('<!-- end -->')[2]}" if mark else text


# ------------------------------------------------------------------------------------------------------ measuring


def in_a_worker(request: Request, say: Say) -> Row:
    """The answer of a process of its own; where that dies, an error in place of the measurements. What it wrote, it and
    what it called, is shown where something failed."""
    row: Row = {"error": "the process ended without an answer"}
    here, there = SPAWN.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r+") as written:
        worker = SPAWN.Process(target=_answer, args=(asked(request), there, written.name))
        worker.start()
        there.close()
        for found in _received(here):
            if isinstance(found, str):
                say(found)
            else:
                row = asked(found)
        worker.join()
        if failed(row):
            print(f"failed: {describe(request)}\n{written.read()[-4000:]}", file=sys.stderr)
    return row


def _received(pipe: Connection) -> Iterator[Any]:
    with contextlib.suppress(EOFError):  # the other end is closed
        while True:
            yield pipe.recv()


def _answer(request: Request, there: Connection, written: str) -> None:
    """In the worker: progress as text, then the row. All sizes are bytes, all times seconds."""
    from bench.experiments import KINDS

    file = os.open(written, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    quieten()
    there.send(attempt(lambda: KINDS[request["kind"]](request, there.send)))


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, or the kind of error: one variant that fails leaves the others be."""
    try:
        return measure()
    except Exception as error:
        traceback.print_exc()
        return {"error": type(error).__name__}


def failed(row: Row) -> bool:
    """Whether a row, or one of its variants, is an error."""
    return "error" in row or any("error" in result for result in row.get("results", {}).values())


@dataclass
class Session:
    """One run of a command: where rows go, whether known ones are measured `again`, and the time (of the monotonic
    clock) after which no further measurement starts."""

    results: Results
    again: bool
    end: float = float("inf")

    def known(self, request: Request) -> Row | None:
        return None if self.again else self.results.find(request)

    def measure(
        self, requests: Iterable[Request], by: Kind = in_a_worker, only: Sequence[Request] | None = None
    ) -> list[Row]:
        """The rows of all requests, without those for which there is no time left.

        `only` are the requests whose rows the file may hold: others are dropped from it.
        """
        requests, rows = list(requests), []
        if only is not None:
            self.results.keep_only(only)
        columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=len(requests))
            for request in requests:
                row = self.known(request)
                if row is None and time.monotonic() < self.end:
                    label = describe(request)
                    bar.update(task, description=label)
                    measured = by(request, lambda text, label=label: bar.update(task, description=f"{label} {text}"))
                    row = self.results.add(request, measured)
                if row is not None:
                    rows.append(row)
                    bar.advance(task)
        if left := len(requests) - len(rows):
            print(f"Out of time with {left} measurements left: the same command again goes on.", file=sys.stderr)
        return rows


def describe(request: Request) -> str:
    """A request in a few words: what it is of, and whom."""
    names, sizes = request["variants"], {**request, **request.get("setup", request.get("layer", {}))}
    told = [f"{k}={sizes[k]}" for k in DESCRIBED if sizes.get(k)]
    return f"{request['kind']} {' '.join(told)}: {names[0] if len(names) == 1 else f'{len(names)} variants'}"


def quieten() -> None:
    """Third parties' warnings off, and no silent fall-back of Dynamo's or ours: a variant is what it says, or an
    error."""
    os.environ.pop("PEFT_FX_DISABLE", None)
    torch._dynamo.config.disable = False
    silence_others()
    warnings.filterwarnings("error", message="peft_fx")
    warnings.filterwarnings("ignore", message="peft_fx cannot hold")  # the least is measured too
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
