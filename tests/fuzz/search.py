"""One case of the fuzzer: drawn, judged, and cut down where it fails."""

from __future__ import annotations

import hashlib
import pathlib
from dataclasses import dataclass
from random import Random

from tests.fuzz.grammar import Program, program
from tests.fuzz.oracles import Case, Failure, Invalid, Verdict, holds_compiled, judge, same_in_other_words, splits

CORPUS = pathlib.Path(__file__).parent.parent / "fuzz_cases"
RESPELLED, SPLIT, COMPILED = 0.2, 0.15, 0.02  # of the cases that can be


@dataclass(frozen=True)
class Found:
    """A program that an oracle fails on."""

    program: Program
    message: str


def search(rng: Random) -> Verdict | Found:
    """The next program that is one, judged."""
    while True:
        drawn, chosen = program(rng), [rng.random() < p for p in (RESPELLED, SPLIT, COMPILED)]
        try:
            return examined(drawn, *chosen)
        except Invalid:
            continue
        except Failure as failure:
            return Found(drawn, str(failure))


def examined(drawn: Program, respelled: bool = True, split: bool = True, compiled: bool = True) -> Verdict:
    """Raises what `judge` raises; the costlier oracles as asked for, and where forward writes."""
    case = Case.of(drawn.source())
    verdict = judge(case)
    if respelled:
        same_in_other_words(case)
    if split or case.traced.written:
        splits(case)
    if compiled and drawn.kind == "exact":
        holds_compiled(case)
    return verdict


def replayed(source: str) -> None:
    """A stored case against every oracle."""
    case = Case.of(source)
    judge(case)
    same_in_other_words(case)
    splits(case)
    if case.kind == "exact":
        holds_compiled(case)


def shrunk(found: Found) -> Found:
    """With steps and options left out for as long as something fails."""
    again = True
    while again:
        again = False
        for smaller in _smaller(found.program):
            try:
                examined(smaller)
            except Invalid:
                continue
            except Failure as failure:
                found, again = Found(smaller, str(failure)), True
                break
    return found


def _smaller(whole: Program):
    yield from (whole.without(i) for i in range(len(whole.steps)) if len(whole.steps) > 1)


def stored(found: Found, where: str) -> pathlib.Path:
    """The case as a file of the corpus."""
    source = found.program.source(f"{where}: {found.message}".replace('"""', "'''"))
    digest = hashlib.sha256(found.program.source().encode()).hexdigest()[:8]
    path = CORPUS / f"case_{digest}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    return path
