"""What the commands share: progress on stderr, and problems that say what to do."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

Say = Callable[[str], None]

PACKAGES: Mapping[str, str] = {
    "transformers": "transformers>=4.57",
    "peft": "peft>=0.17",
    "rich": "rich>=13",
    "matplotlib": "matplotlib>=3.8",
}


class Problem(Exception):
    """What keeps a command from running; its text says what to do about it. The exit status is 2."""


def require(what: str, *packages: str, extra: str = "demo") -> None:
    """Raises a Problem that says what to install, and with which of our extras, where packages are missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        wanted = " ".join(f"'{PACKAGES[name]}'" for name in missing)
        raise Problem(
            f"{what} needs {', '.join(missing)}. Install with\n\n    pip install {wanted}\n\n"
            "or, in a checkout of peft_fx, with the versions that it was tested with:\n\n"
            f"    pip install -c constraints.txt -e '.[{extra}]'"
        )


def silence_others() -> None:
    """Third parties' warnings off; a warning of ours stays, and so does what TORCH_LOGS asks for."""
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", message="peft_fx")
    if "TORCH_LOGS" in os.environ:
        return
    for name in ("torch._dynamo", "torch._inductor", "transformers", "peft", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def check_writable(path: Path) -> Path:
    """The path of a file to be written, before the work that leads to it; a Problem where there is no place for it."""
    if path.is_dir():
        raise Problem(f"{path} is a folder: name a file in it")
    if path.parent.is_dir() and not os.access(path if path.exists() else path.parent, os.W_OK):
        raise Problem(f"{path} may not be written: name another file")
    if not path.parent.is_dir():
        raise Problem(f"There is no folder {path.parent} to write {path.name} in: make it, or name another file")
    return path


@contextlib.contextmanager
def progress(title: str, steps: int | None = None) -> Iterator[Say]:
    """Says what is being done, on stderr: a bar where rich is installed and someone looks, else a line each.

    Every call of what it yields is one of the `steps`; where their number is not known, the bar pulses.
    """
    if importlib.util.find_spec("rich") is None or not sys.stderr.isatty():
        yield lambda text: print(f"{title}: {text}", file=sys.stderr)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=steps)

        def say(text: str) -> None:
            bar.update(task, advance=1, description=f"{title}: {text}")

        yield say
