"""Why an adapter has no weight form.

An adapter that is not linear in its layer's input, that is added elsewhere than to its layer's result, or of which the
graph has a part alone, never shows up as a group. Each of FINDERS looks for one kind of them.

    sums.py          addends of a layer's sum
    convolutions.py  what acts on a convolution's or an embedding's result, or on its windows
    incomplete.py    no layer, no second half, or a factor that changes from call to call
    results.py       added to part of a layer's result, or to one that is read without them
    some_rows.py     for some rows of a batch or of a table
    obstacles.py     what stands between an adapter and its layer, in words
    ways.py          how all of them walk a graph
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set

from torch.fx import Node

from peft_fx.passes.analyse.maps import AffineMaps
from peft_fx.passes.analyse.refusals.convolutions import of_convolutions
from peft_fx.passes.analyse.refusals.incomplete import of_changing_factors, without_base, without_end
from peft_fx.passes.analyse.refusals.results import of_results
from peft_fx.passes.analyse.refusals.some_rows import of_replaced_rows, of_scaled_rows, of_some_rows
from peft_fx.passes.analyse.refusals.sums import of_sums
from peft_fx.passes.analyse.sums import Sums
from peft_fx.passes.findings import Refusal

Finder = Callable[[Sums, AffineMaps, Set[Node]], Iterator[Refusal]]
FINDERS: tuple[Finder, ...] = (  # where two tell of one adapter, the earlier one's reason stands
    of_convolutions,
    of_sums,
    without_base,
    without_end,
    of_results,
    of_changing_factors,
    of_some_rows,
    of_scaled_rows,
    of_replaced_rows,
)


def refusals(analysis: Sums, rows: AffineMaps, placed: Set[Node] = frozenset()) -> list[Refusal]:
    """Every refused adapter of a graph once, in graph order; not those of the parameters that have their place."""
    flow = analysis.flow
    factors = {f.name for g in analysis.groups if not g.backward for f in g.adapter_factors}
    placed = placed | {p for name in factors for p in flow.parameters(name)}
    found = [*analysis.refusals, *(refusal for find in FINDERS for refusal in find(analysis, rows, placed))]
    return list({r.name: r for r in reversed(found)}.values())[::-1]
