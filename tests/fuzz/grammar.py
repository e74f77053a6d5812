"""Random models as plain torch programs: a case is its source text.

Values v0, v1, … have a shape and a dtype; each step of a model reads some and makes one, or changes one in place. What
no step reads is returned. Three kinds: `exact`, fp64 and ops that keep integers; `mixed`, half-precision bases beside
fp32 adapters; `real`, fp32 and ops that round.
"""

from __future__ import annotations

from math import prod
from random import Random

from peft_fx.passes.decide.machine import MACHINES
from tests.fuzz.adapters import ADAPTERS
from tests.fuzz.drafts import BF16, DIMS, F32, F64, LARGEST, Draft
from tests.fuzz.others import OTHER
from tests.fuzz.programs import Leaf, Program


def program(rng: Random) -> Program:
    """One or two inputs, and one to five steps of which one at least plants an adapter."""
    kind = rng.choices(["exact", "mixed", "real"], [6, 2, 2])[0]
    d = Draft(rng, kind)
    dtypes = {"exact": [F64], "real": [F32], "mixed": [F32, BF16, BF16]}[kind]
    T = rng.choice([*DIMS, *DIMS, 0]) if rng.random() < 0.5 else rng.choice([3, 4, 5, 8])
    inputs = {}
    for _ in range(rng.choice([1, 1, 2])):
        lead = rng.choice([(T,), (T,), (2, T), (1, T), (T, 1)])
        leaf = Leaf((*lead, rng.choice(DIMS)), rng.choice(dtypes), rng.random() < 0.5)
        inputs[d.new(leaf.shape, leaf.dtype)] = leaf
    count = rng.choice([1, 2, 3, 3, 4, 5])
    planted, steps = rng.randrange(count), []
    while len(steps) < count:
        v = rng.choice([next(reversed(d.values)), *d.values])
        table = ADAPTERS if len(steps) == planted or rng.random() < 0.6 else OTHER
        make = rng.choices([f for _, f in table], [w for w, _ in table])[0]
        before = dict(d.values), dict(d.weights)
        step = make(d, v)
        if step is None or any(prod(shape) > LARGEST for shape, _ in d.values.values()):
            (d.values, d.weights), d.params = before, {}
            continue
        steps.append(step)
    options = {
        "form": rng.choice(["weight"] * 8 + ["auto", "activation"]),
        "numerics": rng.choice(["default"] * 6 + ["strict"]),
        "rounding": rng.choice(["nearest"] * 4 + ["dithered"]),
        "keep": rng.choice(["recompute"] * 5 + ["inductor"]),
        "machine": rng.choice(sorted(MACHINES)),
        "adapter_grad": rng.choice(["auto"] * 4 + ["low_rank", "dense"]),
    }
    if options["numerics"] == "strict" and options["adapter_grad"] == "dense":  # no such combination
        options["adapter_grad"] = "auto"
    return Program(kind, inputs, tuple(steps), options)
