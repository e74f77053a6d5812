"""What is measured, an `Experiment` each:

steps.py       memory, time, fit: bytes and seconds of a training step
suites.py      suite: lists of those, whose results are committed
budget.py      budget: time against memory, within budgets
estimating.py  estimate, long-context: what `peft_fx.estimate` says
compiling.py   compile: seconds of the passes
kernels.py     kernels: what a step consists of on a GPU that is not there
sweep.py       sweep: the forms of one layer
training.py    small models pretrained, adapted and trained in each of several forms
rounding.py    study rounding: what the rounding of W' is worth in that
keeping.py     study keep: what lossy keeps cost in that
"""

from bench.coverage import COVERAGE
from bench.experiment import Command, Experiment
from bench.experiments import budget, compiling, estimating, keeping, kernels, rounding, steps, suites, sweep

STUDY = Command(
    name="study",
    text="What rounding, and lossy keeps, do to training: small models, trained in each of several forms.",
    members=(rounding.ROUNDING, keeping.KEEP),
)
COMMANDS: tuple[Command, ...] = (
    *(steps.MEMORY, steps.TIME, steps.FIT),
    suites.SUITE,
    budget.BUDGET,
    compiling.COMPILE,
    COVERAGE,
    *(estimating.ESTIMATE, estimating.LONG),
    kernels.KERNELS,
    STUDY,
    sweep.SWEEP,
)
_EXPERIMENTS = (e for c in COMMANDS for e in (c, *c.members) if isinstance(e, Experiment))
KINDS = {kind: run for e in _EXPERIMENTS for kind, run in e.kinds.items()}
