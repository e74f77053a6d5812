"""Random affine programs with planted LoRA motifs: bit-equal to eager, forward and all gradients."""

import torch
from hypothesis import given

import peft_fx
from tests.oracle import assert_bit_equal, run, weight_form
from tests.strategies import Program, programs, same_at_every_run

EXAMPLES = 200


def test_random_programs_are_bit_equal():
    """200 programs, the same at every run; most of the planted motifs are found."""
    rewritten = []

    @same_at_every_run(EXAMPLES)
    @given(programs())
    def check(program: Program):
        torch._dynamo.reset()
        module, inputs = program.module(), program.arguments()
        want = run(module, module, inputs)
        assert all(t.abs().max() < 2**50 for _, t in want.items() if t is not None)  # exact in fp64
        f = weight_form(module)
        assert_bit_equal(run(f, module, inputs), want)
        rewritten.append(any(s.forward == "weight" for s in peft_fx.explain(f).sites))

    check()
    assert len(rewritten) >= EXAMPLES
    assert sum(rewritten) >= 0.6 * len(rewritten), f"{sum(rewritten)} of {len(rewritten)} programs rewritten"
