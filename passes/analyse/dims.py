"""What the dimensions of a value count: tokens of a source, or features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from peft_fx.passes.analyse.algebra import Size
from peft_fx.passes.graph.nodes import (
    numel,
)


@dataclass(frozen=True)
class Token:
    """One of the source's dimensions that count tokens, or a part of one, the slowest first."""

    index: int
    size: Size
    part: int = 0


Atom = Token | int  # a token dimension, or the size of a part of the features
Dims = tuple[tuple[Atom, ...], ...]  # for each dimension of a value, what it is made of, row by row


def _size(atom: Atom) -> Size:
    return atom.size if isinstance(atom, Token) else atom


def regroup(dims: Dims, sizes: Iterable[Size]) -> Dims | None:
    """The dimensions of a reshaped value; None where that would tear apart tokens of unknown number."""
    atoms = [a for dim in dims for a in dim]
    found: list[tuple[Atom, ...]] = []
    for n in sizes:
        group: list[Atom] = []
        while (done := numel([_size(a) for a in group])) != n:
            if not atoms:
                return None
            atom = atoms.pop(0)
            if all(isinstance(v, int) for v in (n, done, _size(atom))):
                if 0 in (n, done):
                    return None
                wanted, rest = divmod(n, done)
                if rest:
                    return None
                if _size(atom) > wanted:
                    parts, rest = divmod(_size(atom), wanted)
                    if rest:
                        return None
                    if isinstance(atom, Token):
                        atoms.insert(0, replace(atom, size=parts, part=atom.part + 1))
                        atom = replace(atom, size=wanted)
                    else:
                        atoms.insert(0, parts)
                        atom = wanted
            if group and isinstance(atom, int) and isinstance(group[-1], int):
                group[-1] *= atom
            else:
                group.append(atom)
        found.append(tuple(group))
    return tuple(found) if not atoms else None


def plain(dims: Dims) -> bool:
    """All tokens first, then the features in one piece."""
    atoms = [a for dim in dims for a in dim]
    return len(atoms) > 0 and isinstance(atoms[-1], int) and all(isinstance(a, Token) for a in atoms[:-1])


def in_order(dims: Dims) -> bool:
    """All tokens first, in the source's order, then the features."""
    atoms = [a for dim in dims for a in dim]
    tokens = [a for a in atoms if isinstance(a, Token)]
    return atoms[: len(tokens)] == sorted(tokens, key=lambda t: (t.index, t.part))
