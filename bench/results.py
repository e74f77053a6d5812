"""Results as JSON: {"runs": [what measured: command, device, versions, commit], "rows": [{..., "run": index}]}."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import peft_fx
from bench.variants import FLOORS
from peft_fx import machines
from peft_fx.inductor_passes import source_digest
from zoo.models import Setup

ROOT = Path(__file__).parent
FOLDER = ROOT / "results"
SAME = ("device", "threads", "torch", "transformers", "peft")  # a row measured under others is measured again


class Results:
    """One file of results. Rows are added one by one, and each is on disk before the next is measured."""

    def __init__(self, path: Path, device: str):
        self.path = path
        stored = json.loads(path.read_text()) if path.exists() else {"runs": [], "rows": []}
        self.runs, self.rows = stored["runs"], stored["rows"]
        self.run = environment(device)

    def find(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row of the same request, if it would come out the same today: same device, versions and, where our code
        is in it, same source."""
        for row in self.rows:
            if _answers(row, asked(request)):
                ours = any("peft_fx" in name for name in row["variants"])
                same = (*SAME, "source") if ours else SAME
                if "error" not in row and all(self.runs[row["run"]][k] == self.run[k] for k in same):
                    return row
        return None

    def add(self, request: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
        """Stores a row in place of any of the same request."""
        key = asked(request)
        self.rows = [row for row in self.rows if not _answers(row, key)]
        if self.run not in self.runs:
            self.runs.append(self.run)
        row = {**key, **measured, "run": self.runs.index(self.run)}
        self.rows.append(row)
        self._write()
        return row

    def keep_only(self, requests: Sequence[Mapping[str, Any]]) -> None:
        """Drops the rows of other requests: those that a suite no longer asks for."""
        keys = [asked(request) for request in requests]
        kept = [row for row in self.rows if any(_answers(row, key) for key in keys)]
        if len(kept) < len(self.rows):
            self.rows = kept
            self._write()

    def _write(self) -> None:
        used = sorted({row["run"] for row in self.rows})
        for row in self.rows:
            row["run"] = used.index(row["run"])
        self.runs = [self.runs[i] for i in used]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"runs": self.runs, "rows": self.rows}, indent=1, default=str) + "\n")
        partial.replace(self.path)


def _answers(row: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
    return all(row.get(k) == v for k, v in key.items())


def asked(request: Mapping[str, Any]) -> dict[str, Any]:
    """The request as JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(request))  # type: ignore[no-any-return]


def request(kind: str, setup: Setup, variants: Sequence[str], **more: Any) -> dict[str, Any]:
    """What to measure. Without adapters their settings do not matter, and one row serves all of them."""
    fields = asdict(setup)
    if all(name in FLOORS for name in variants) and kind in ("memory", "kernels", "rehearsal"):
        fields |= {"rank": 0, "dropout": 0.0, "method": "none", "targets": "none"}
        fields["dtype"] = "bf16" if setup.dtype == "peft" else setup.dtype
    return {"kind": kind, "setup": fields, "variants": list(variants), **more}


def unique(requests: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Each request once."""
    return list({json.dumps(request): request for request in requests}.values())


def environment(device: str) -> dict[str, Any]:
    """What the numbers depend on besides the request."""
    return {
        "command": "python -m bench " + shlex.join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        "peft_fx": peft_fx.__version__,
        "commit": commit(),
        "source": source_digest()[:16],
    }


def device_name(device: str) -> str:
    """The GPU's name, or the processor's model and number of cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{machines.processor()}, {os.cpu_count()} cores"


def commit() -> str:
    """The commit checked out; empty where there is none. It does not tell of changes since: `source` does, a hash of
    the project's files."""
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return asked.stdout.strip() if asked.returncode == 0 else ""


def provenance(run: Mapping[str, Any]) -> str:
    """Where numbers come from, in a line under their table."""
    versions = ", ".join(f"{name} {run[name]}" for name in ("torch", "transformers", "peft", "peft_fx"))
    commit = f", commit {run['commit'][:10]}" if run["commit"] else ""
    return f"`{run['command']}` on {run['device']}, {run['threads']} threads; {versions}{commit}; {run['date']}."
