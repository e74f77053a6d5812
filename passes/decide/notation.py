"""The algebra of a site in plain notation: `y = xW + s(xA)B` and, merged, `y = x(W + sAB)`. Text alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

from peft_fx.passes.analyse.algebra import Scale
from peft_fx.passes.analyse.candidates import MapCandidate, SumCandidate

SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
NAMES = {1: ("Δ",), 2: ("A", "B"), 3: ("A", "M", "B")}


def written(one: SumCandidate | MapCandidate) -> tuple[str, str]:
    """A group or region as it is written, and in weight form.

    x and y are the layer's input and result, dx and dy their gradients; `f` is what of a layer is affine and no sum of
    products: W′ then is what it makes of the rows of an identity matrix.
    """
    if isinstance(one, MapCandidate):
        return (
            ("dx = fᵀ(dy)", "dx = dy·W′ᵀ") if one.backward else ("y = f(x), affine in x", "y = xW′ + b′, W′ from f(I)")
        )
    left, u = ("dx", "dy") if one.backward else ("y", "x")
    names = _names([len(t.factors) for t in one.remainders])
    scales = _scales(one.ratios)
    base, *terms = (_product(one, u, factors) for factors in (["W"], *names))
    before = " + ".join([base, *(_scaled(s, t) for s, t in zip(scales, terms, strict=True))])
    columns = one.right and one.product.window is None  # W stands left of its input
    deltas = [s + "".join(reversed(f) if columns else f) for s, f in zip(scales, names, strict=True)]
    merged = f"({' + '.join(['W', *deltas])})"
    return f"{left} = {before}", f"{left} = {_applied(one, u, merged + 'ᵀ' * one.backward)}"


def scale_of(one: SumCandidate | MapCandidate) -> str:
    """What the scales are, where they are numbers: `s = 2`."""
    ratios = [] if isinstance(one, MapCandidate) else one.ratios
    named = zip(_scales(ratios), ratios, strict=True)
    return ", ".join(f"{name} = {s.number:g}" for name, s in named if name and s and not s.names)


def _names(lengths: Sequence[int]) -> list[list[str]]:
    """The factors of each term in the order in which they multiply x."""
    found = []
    for i, k in enumerate(lengths, 1):
        plain = NAMES.get(k) or ("A", *(f"M{_subscript(j)}" for j in range(1, k - 1)), "B")
        found.append([name + _subscript(i) if len(lengths) > 1 else name for name in plain])
    return found


def _scales(ratios: Sequence[Scale | None]) -> list[str]:
    return [
        "" if s is not None and s.key() == Scale().key() else "s" + (_subscript(i) if len(ratios) > 1 else "")
        for i, s in enumerate(ratios, 1)
    ]


def _product(group: SumCandidate, u: str, factors: Sequence[str]) -> str:
    """`u` times factors, from left to right or the other way round, and transposed in backward."""
    if group.backward:
        factors = [f"{f}ᵀ" for f in reversed(factors)]
    for f in factors[:-1]:
        u = f"({_applied(group, u, f)})" if not group.product.gathered else _applied(group, u, f)
    last = factors[-1]
    return f"{u}{last}" if group.product.gathered and len(factors) > 1 else _applied(group, u, last)


def _applied(group: SumCandidate, u: str, matrix: str) -> str:
    """One product with `u`: by rows, by columns, as a convolution, or as rows of a table."""
    if group.product.window is not None:
        return f"{u}∗{matrix}"
    if group.product.gathered:
        return f"{matrix}[{u}]"
    return _joined(matrix, u) if group.right else _joined(u, matrix)


def _joined(a: str, b: str) -> str:
    """Two factors, with a dot where they would read as one."""
    plain = re.fullmatch(r"[^\W\d_][₀-₉]*|.*\)", a) or b.startswith("(")
    return f"{a}{b}" if plain else f"{a}·{b}"


def _scaled(scale: str, product: str) -> str:
    return f"{scale}{product}" if not scale or product.startswith("(") else f"{scale}·{product}"


def _subscript(i: int) -> str:
    return str(i).translate(SUBSCRIPTS)
