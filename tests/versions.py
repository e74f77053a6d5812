"""Runs the tests against other versions of PyTorch, transformers and PEFT, and writes docs/compatibility.md.

    python -m tests.versions [--only NAME ...] [--torch-index URL] [PYTEST ARGUMENT ...]

Each set of versions gets a virtual environment of its own, which is removed at the end. Without further arguments the
tests are those of `TESTS`: every place where the project meets somebody else's code. What cannot be installed, or was
not asked for, keeps the row that it has.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "compatibility.md", ROOT / "docs" / "compatibility.json"
SETS = {
    "oldest libraries": ["torch==2.13.0", "transformers==4.57.1", "peft==0.17.0"],
    "oldest torch": ["torch==2.11.0"],
    "oldest of all": ["torch==2.11.0", "transformers==4.57.1", "peft==0.17.0"],
    "tested": ["-c", str(ROOT / "constraints.txt")],
    "newest libraries": ["torch==2.13.0"],
    "newest torch": ["torch==2.14.1"],
    "newest of all": [],
}
TESTS = [
    "compat",
    "backend",
    "options",
    "keys",
    "budgeting",
    "explain",
    "peft",
    "main_job",
    "trainers",
    "distributed",
    "examples",
]
PACKAGES = ["torch", "transformers", "peft", "accelerate", "trl"]
HEAD = """# Compatibility

What `python -m tests.versions` found. It makes an environment for each row, and runs the tests of every place where the
project meets somebody else's code.

| versions | Python | {packages} | tests | on |
|---|---|{rules}|---|---|
"""


def run(command: list[str], **kwargs) -> subprocess.CompletedProcess:
    print("$", *command, flush=True)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **kwargs)


def row(name: str, tests: list[str], index: list[str]) -> dict[str, str]:
    """What became of one set of versions."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        installed = run([python, "-m", "pip", "install", "--quiet", *index, *SETS[name], "-e", ".[test]"])
        if installed.returncode:
            (*_, why) = installed.stderr.strip().splitlines() or ["no reason given"]
            return {"tests": f"not run: {why}"}
        listed = json.loads(run([python, "-m", "pip", "list", "--format=json"]).stdout)
        found = {p["name"]: p["version"] for p in listed}
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = run([python, "-m", "pytest", "-q", "-n", "2", *tests], env=environment)
        print(done.stdout[-6000:])
        outcome = (re.findall(r"^=*\s*(\d+ \w+.*?)(?: in .*)?\s*=*$", done.stdout, re.MULTILINE) or ["no tests ran"])[
            -1
        ]
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        return {
            "Python": "{}.{}".format(*sys.version_info),
            **{p: found.get(p, "none") for p in PACKAGES},
            "tests": "; ".join([outcome, *failed]),
            "on": str(date.today()),
        }


def page(rows: dict[str, dict[str, str]]) -> str:
    columns = ["Python", *PACKAGES, "tests", "on"]
    lines = ["| " + " | ".join([name, *(r.get(c, "") for c in columns)]) + " |" for name, r in rows.items()]
    head = HEAD.format(packages=" | ".join(PACKAGES), rules="|".join(["---"] * len(PACKAGES)))
    return head + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--torch-index", help="where PyTorch comes from, such as its own index of CPU builds")
    args, tests = parser.parse_known_args()
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in args.only:
        index = ["--extra-index-url", args.torch_index] if args.torch_index else []
        files = [str(p) for t in TESTS for p in (ROOT / "tests").rglob(f"test_{t}.py")]
        rows[name] = row(name, tests or files, index)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        _, mark, rest = PAGE.read_text().partition("\n## ")  # what else is known stays
        PAGE.write_text(page(rows) + mark + rest)


if __name__ == "__main__":
    main()
