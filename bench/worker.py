"""One measurement in a fresh process: `python -m bench.worker` reads a request as JSON and writes lines of JSON.

A request is {"kind": one of `KINDS`, "variants": [...], ...}. Each answer is {"progress": text} or, at the end,
{"row": {...}}. All sizes are bytes, all times seconds.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from bench.experiments import KINDS
from bench.running import attempt, quieten


def main() -> int:
    """Answers the one request on stdin; what others print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**line: Any) -> None:
        print(json.dumps(line), file=answers, flush=True)

    quieten()
    request = json.load(sys.stdin)
    kind = KINDS[request["kind"]]
    answer(row=attempt(lambda: kind(request, lambda text: answer(progress=text))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
