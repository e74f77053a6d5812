"""A model as a plain torch program: its leaves, its steps, its source text."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

from tests.support import row_ops, spellings

Shape = tuple[int, ...]
BY_RANK: Mapping[int, tuple[Callable, ...]] = {
    2: (spellings.addmm, spellings.addmm_beta, spellings.weight_on_the_left),
    3: (spellings.einsum_tokens, spellings.transposed_inside),
}


@dataclass(frozen=True)
class Leaf:
    """An input, a parameter or a buffer."""

    shape: Shape
    dtype: str
    trained: bool
    buffer: bool = False

    def made(self) -> str:
        return f"torch.empty({self.shape}, dtype=torch.{self.dtype})"

    def registered(self, name: str) -> str:
        """The line that gives a module this one."""
        if not self.buffer:
            return f"self.{name} = nn.Parameter({self.made()}, requires_grad={self.trained})"
        layer, _, own = name.partition(".")
        return f"self.{layer}.register_buffer({own!r}, {self.made()})"


@dataclass(frozen=True)
class Step:
    """Lines of a forward, what they read and make, their parameters; `others` say the same in other words, in the
    source a second class."""

    lines: tuple[str, ...]
    reads: tuple[str, ...]
    makes: str | None
    params: Mapping[str, Leaf] = field(default_factory=dict)
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """Inputs, steps, the options of the passes, and what numbers to try it on."""

    kind: str
    inputs: Mapping[str, Leaf]
    steps: tuple[Step, ...]
    options: Mapping[str, str]

    def source(self, note: str = "A random program.") -> str:
        """The program as a file of its own."""
        lines = [line for step in self.steps for line in step.lines]
        params = {name: leaf for step in self.steps for name, leaf in step.params.items()}
        read = {name for step in self.steps for name in step.reads}
        unread = [s.makes for s in self.steps if s.makes and s.makes not in read]
        outputs = unread or [next(reversed(self.inputs))]
        ending = f"return {', '.join(outputs)},"
        body, other = (
            "\n".join(f"        {line}" for line in [*words, ending])
            for words in (lines, [line for step in self.steps for line in step.others or step.lines])
        )
        other = f"""class Other(Model):
    def forward(self, {", ".join(self.inputs)}):
{other}


""" * (other != body)
        made = [f"self.{layer} = nn.Module()" for layer in dict.fromkeys(n.partition(".")[0] for n in params)]
        made += [leaf.registered(name) for name, leaf in params.items()]
        built = "\n".join(f"        {line}" for line in made)
        given = ", ".join(f"{leaf.made()}.requires_grad_({leaf.trained})" for leaf in self.inputs.values())
        return f'''"""{note}"""

import torch
import torch.nn.functional as F
from torch import nn

{"".join(_helpers(body + other))}
class Model(nn.Module):
    def __init__(self):
        super().__init__()
{built}

    def forward(self, {", ".join(self.inputs)}):
{body}


{other}def inputs():
    return ({given},)


KIND = {self.kind!r}
OPTIONS = {dict(self.options)!r}
'''

    def without(self, i: int) -> Program:
        """The program without a step, and without those that read what it made."""
        gone, kept = {self.steps[i].makes}, []
        for j, step in enumerate(self.steps):
            if j == i or not gone.isdisjoint(step.reads):
                gone.add(step.makes)
            else:
                kept.append(step)
        params = {name: leaf for step in self.steps for name, leaf in step.params.items()}
        owned: set[str] = set()
        steps = []
        for step in kept:  # a weight shared with a step that went away is the next one's own
            needed = {n: params[n] for line in step.lines for n in re.findall(r"self\.(\w+\.\w+)", line)}
            steps.append(replace(step, params={n: p for n, p in needed.items() if n not in owned}))
            owned |= set(needed)
        return replace(self, steps=tuple(steps))


HELPERS = {
    f.__name__: f
    for f in [
        *spellings.ANY_RANK,
        *(f for spells in BY_RANK.values() for f in spells),
        *(spellings.bmm_of_one, spellings.experts, spellings.experts_baddbmm, spellings.peft_casts),
    ]
}
OTHERS = {"rows": row_ops.rows} | {name: op.f for name, op in row_ops.OPS.items()}


@cache
def _text(f: Callable) -> str:
    return inspect.getsource(f) + "\n\n"


def _helpers(body: str) -> list[str]:
    """The source of the functions that a text calls, and of those that these call."""
    found: dict[str, str] = {}
    todo = [body]
    while todo:
        for name in re.findall(r"(?<![\w.])(\w+)\(", todo.pop()):
            f = HELPERS.get(name) or OTHERS.get(name)
            if f is not None and name not in found:
                found[name] = _text(f)
                todo.append(found[name])
    return [found[name] for name in sorted(found)]
