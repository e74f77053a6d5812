"""Takes measurements one by one, each in a fresh process where nothing else is said, with a progress bar on stderr."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.results import Results, asked

Request = Mapping[str, Any]
Row = dict[str, Any]
Say = Callable[[str], None]
Kind = Callable[[Request, Say], Row]  # answers requests of one kind, and says how far it is
SPAWN = get_context("spawn")


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
    """A request in a few words: its sizes, and whom it is of."""
    names, sizes = request["variants"], {**request, **request.get("layer", {})}
    if "setup" in request:
        setup = request["setup"]
        sizes |= {"model": setup["model"], "T": setup["tokens"], "dtype": setup["dtype"]}
        sizes |= {"dropout": setup["dropout"]} if setup["dropout"] else {}
    told = [f"{k}={v}" for k, v in sizes.items() if isinstance(v, (str, int, float)) and k != "kind"]
    who = names[0] if len(names) == 1 else f"{len(names)} variants"
    return f"{request['kind']} {' '.join(told)}: {who}"


def quieten() -> None:
    """Third parties' warnings off, and no silent fall-back of Dynamo's or ours: a variant is what it says, or an
    error."""
    os.environ.pop("PEFT_FX_DISABLE", None)
    torch._dynamo.config.disable = False
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", message="peft_fx")
    warnings.filterwarnings("ignore", message="peft_fx cannot hold")  # the least is measured too
    for name in ("torch._dynamo", "torch._inductor", "transformers", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
