"""Takes measurements one by one, each in a fresh process, with a progress bar on stderr."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.results import ROOT, Results, asked

Request = Mapping[str, Any]
Row = dict[str, Any]


def measure_all(requests: Sequence[Request], results: Results, *, again: bool, minutes: float = 0) -> list[Row]:
    """The rows of all requests; one that `results` has already is measured only if `again`.

    After `minutes` (0: no limit) no further measurement starts, and the rest is left for the next call.
    """
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    rows: list[Row] = []
    with progress_bar() as bar:
        task = bar.add_task("", total=len(requests))
        for request in requests:
            row = None if again else results.find(request)
            if row is None and time.monotonic() < end:
                label = describe(request)
                bar.update(task, description=label)
                measured = _measure(request, lambda text, label=label: bar.update(task, description=f"{label} {text}"))
                row = results.add(request, measured)
            if row is not None:
                rows.append(row)
                bar.advance(task)
    if len(rows) < len(requests):
        left = len(requests) - len(rows)
        print(f"Out of time with {left} measurements left: the same command again goes on.", file=sys.stderr)
    return rows


def measure_here(
    requests: Sequence[Request],
    results: Results,
    measure: Callable[[Request], Row],
    describe: Callable[[Request], str],
    *,
    again: bool,
) -> None:
    """The same in this process, for measurements that share what they prepare."""
    with progress_bar() as bar:
        task = bar.add_task("", total=len(requests))
        for request in requests:
            bar.update(task, description=describe(request))
            if again or results.find(request) is None:
                results.add(request, measure(request))
            bar.advance(task)


def describe(request: Request) -> str:
    """A request in a few words, for the progress bar."""
    if request["kind"] == "sweep":
        return "K={K} N={N} r={r} {dtype}".format(**request["layer"])
    setup, names = request["setup"], request["variants"]
    dropout = f" dropout {setup['dropout']}" if setup["dropout"] else ""
    who = names[0] if len(names) == 1 else f"{len(names)} variants"
    return f"{request['kind']} {setup['model']} T={setup['tokens']} {setup['dtype']}{dropout}: {who}"


def _measure(request: Request, say: Any) -> Row:
    """One worker's answer; where it dies, an error in place of the measurements, and what it wrote to stderr shown."""
    row: Row = {"error": "the process ended without an answer"}
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "bench.worker"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        with subprocess.Popen(command, text=True, cwd=ROOT.parent, **pipes) as worker:  # type: ignore[call-overload]
            json.dump(asked(request), worker.stdin)
            worker.stdin.close()
            for line in worker.stdout:
                answer = json.loads(line)
                row = answer.get("row", row)
                say(answer.get("progress", ""))
        if failed(row):
            _show(request, row, errors)
    return row


def failed(row: Row) -> bool:
    """Whether a row, or one of its variants, is an error."""
    return "error" in row or any("error" in result for result in row.get("results", {}).values())


def _show(request: Request, row: Row, errors: TextIO) -> None:
    errors.seek(0)
    print(f"failed: {describe(request)}\n{errors.read()[-4000:]}", file=sys.stderr)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """On stderr, so that what goes to a file are the tables alone."""
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield bar
