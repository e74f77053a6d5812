"""python -m tests.fuzz --cases 5000 [--seed S] [--jobs N] [--mutant NAME] [--list-mutants]"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from functools import partial
from random import Random
from typing import Any

import torch

from tests.fuzz.oracles import Verdict
from tests.fuzz.search import Found, search, shrunk, stored
from tests.passes.analyse import test_mutants_of_algebra, test_mutants_of_linear_rules, test_mutants_of_maps
from tests.passes.graph import test_mutants_of_editor
from tests.passes.normalise import test_mutants_of_fused_layers
from tests.passes.rewrite import test_mutants_of_materialise, test_mutants_of_merge_maps, test_mutants_of_merge_sums

BROKEN = [
    *(test_mutants_of_linear_rules, test_mutants_of_algebra, test_mutants_of_merge_sums, test_mutants_of_materialise),
    *(test_mutants_of_maps, test_mutants_of_merge_maps, test_mutants_of_editor, test_mutants_of_fused_layers),
]

# what these break shows in what is reported, or in too few random programs: mutation.py has programs for them
SHY = {
    "strides_not_kept",
    "every_weight_taken_for_the_same_at_all_tokens",
    "joined_in_the_wrong_order",
    "next_layer_taken_for_the_same",
    "order_of_features_ignored",
    "order_of_tokens_not_looked_at",
    "tokens_taken_for_features",
}
ALL = {name: make for module in BROKEN for name, make in module.MUTANTS.items() if name not in SHY}
LEAST = {"rewritten": 0.6, "refused": 0.2}


def searched(seed: int, i: int) -> Verdict | Found:
    """Case i of a seed, the same in whichever process."""
    return search(Random(f"{seed}:{i}"))


def _forked(jobs: int) -> Any:
    """A pool of processes that are as this one is now, a mutant included."""
    return multiprocessing.get_context("fork").Pool(jobs)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Random models against oracles.")
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="case i of a seed is the same at every run")
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that share the cases (default: 1)")
    parser.add_argument("--mutant", choices=ALL, metavar="NAME", help="break a rule on purpose: a failure is expected")
    parser.add_argument("--list-mutants", action="store_true")
    parser.add_argument("--keep-going", action="store_true", help="on after a failure")
    asked = parser.parse_args()
    if asked.list_mutants:
        print("\n".join(ALL))
        return 0
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)  # programs that eager refuses
    warnings.filterwarnings("ignore")
    start, counts = time.time(), Counter()
    numbers = range(asked.first, asked.first + asked.cases)
    with contextlib.ExitStack() as stack:
        if asked.mutant:
            stack.enter_context(ALL[asked.mutant]())
        each = map if asked.jobs == 1 else stack.enter_context(_forked(asked.jobs)).imap
        for i, found in zip(numbers, each(partial(searched, asked.seed), numbers), strict=True):
            if isinstance(found, Found):
                counts["failed"] += 1
                print(f"case {i} of seed {asked.seed}: {found.message}", flush=True)
                if asked.mutant:
                    return 1
                print(f"stored as {stored(shrunk(found), f'Seed {asked.seed}, case {i}')}", flush=True)
                if not asked.keep_going:
                    return 1
                continue
            counts["cases"] += 1
            counts["rewritten"] += found.rewritten
            counts["refused"] += found.refused
    shares = {k: counts[k] / max(1, counts["cases"]) for k in LEAST}
    told = ", ".join(f"{share:.0%} {k}" for k, share in shares.items())
    print(f"{asked.cases} cases in {time.time() - start:.0f} s: {counts['failed']} failures, {told}")
    few = [k for k, share in shares.items() if asked.cases >= 1000 and share < LEAST[k]]
    if few and not counts["failed"]:
        print(f"too few cases {' and '.join(few)}: at least {', '.join(f'{LEAST[k]:.0%}' for k in few)} are wanted")
    return int(bool(counts["failed"] or few))


if __name__ == "__main__":
    sys.exit(main())
