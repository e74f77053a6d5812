"""A joint or inference graph, and all that is known of it: what every pass is given.

An analysis is made once for each state of the graph, and again after an edit. A pass that edits while it reads an older
one takes that into a local first: then it is on the page that it is older.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from torch.fx import Graph, Node

from peft_fx.passes.analyse.algebra import Size
from peft_fx.passes.analyse.flow import Flow, Roles
from peft_fx.passes.analyse.maps import AffineMaps
from peft_fx.passes.analyse.reader import Reader
from peft_fx.passes.analyse.sums import Sums
from peft_fx.passes.decide.regimes import AtLeast, Regimes
from peft_fx.passes.findings import Outcome
from peft_fx.passes.graph.editor import Editor
from peft_fx.passes.graph.nodes import value_numbers
from peft_fx.passes.keep.chains import Recompute

if TYPE_CHECKING:
    from peft_fx.passes.analyse.candidates import MapCandidate, SumCandidate
    from peft_fx.passes.decide.choosing import Candidate

T = TypeVar("T")


@dataclass(frozen=True)
class Sizes:
    """Dynamic sizes as numbers. `hint` adds no guard; `at_least` does, and gives None for what only the run tells."""

    hint: Callable[[Size], int]
    at_least: AtLeast

    @classmethod
    def of(cls, hint: Callable[[Size], int], at_least: AtLeast | None = None) -> Sizes:
        return cls(hint, at_least or (lambda size, n: hint(size) >= n))


class Tentative(Protocol):
    """A rewriting that is taken back where no adapter made use of it."""

    def settle(self) -> None: ...


@dataclass
class Notes:
    """What one pass tells a later one. By whom, and for whom:

    tentative     fused_layers, fused_weights, for merge_sums, which has them settled, the last one first
    layer_inputs  find, for compress: what layers read
    adapter_of    find and merge_sums, for dense_grads and compress: parameters, with the adapter's name
    layers        decide and merge_maps, for recompute: the weights that adapters are beside
    reads_tokens  dense_grads, for compress and recompute: products that serve parameter gradients alone
    rebuilt       compress, for recompute: what is made again in any case
    as_it_was     dense_grads, for in_place_reads and recompute: the graph is Inductor's, and no other
    maps          find, for decide: the affine adapters
    as_written    find, for merge_sums: the sums before anything was merged
    regimes       decide, for merge_maps and merge_sums: the numbers of tokens that all is decided at
    settled       decide, for merge_maps: the base products that the regimes are settled for
    chosen_maps   decide, for merge_maps: the maps that are to be in weight form
    groups, sums  decide and merge_maps, for merge_sums: the adapters that are sums, and their prices
    """

    tentative: list[Tentative] = field(default_factory=list)
    layer_inputs: frozenset[Node] = frozenset()
    adapter_of: dict[Node, str] = field(default_factory=dict)
    layers: set[Node] = field(default_factory=set)
    reads_tokens: frozenset[Node] = frozenset()
    rebuilt: frozenset[Node] = frozenset()
    as_it_was: bool = False
    maps: list[MapCandidate] = field(default_factory=list)
    as_written: Sums | None = None
    regimes: Regimes | None = None
    settled: set[Node] = field(default_factory=set)
    chosen_maps: list[MapCandidate] = field(default_factory=list)
    groups: list[SumCandidate] = field(default_factory=list)
    sums: list[Candidate] = field(default_factory=list)


class analysis(Generic[T]):
    """A property of a Joint that is made once for each state of its graph."""

    def __init__(self, make: Callable[[Joint], T]):
        self.make, self.__doc__ = make, make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, joint: Joint, owner: type) -> T:
        found: T = joint.once(self.name, self.make)
        return found


class Joint:
    """The graph, what its inputs are, the mode of its fake values; `edit` is all that changes it, `notes` and `found`
    are what passes have told."""

    def __init__(
        self,
        graph: Graph,
        roles: Roles,
        fake_mode: AbstractContextManager[Any],
        sizes: Sizes,
        strict: bool = False,
    ):
        self.graph, self.roles, self.fake_mode, self.sizes, self.strict = graph, roles, fake_mode, sizes, strict
        self.edit = Editor(graph, fake_mode)
        self.notes, self.found = Notes(), Outcome()
        self._state, self._known = self.edit.changes, dict[str, Any]()

    def once(self, name: str, make: Callable[[Joint], Any]) -> Any:
        """What is known of the graph as it is now."""
        if self._state != self.edit.changes:
            self._state, self._known = self.edit.changes, {}
        if name not in self._known:
            self._known[name] = make(self)
        return self._known[name]

    @analysis
    def flow(self) -> Flow:
        """What depends on what."""
        return Flow(self.graph, self.roles)

    @analysis
    def numbers(self) -> dict[Node, Node]:
        """Every node's first equal."""
        return value_numbers(self.graph)

    @analysis
    def position(self) -> dict[Node, int]:
        """Every node's place in the graph's order."""
        return {node: i for i, node in enumerate(self.graph.nodes)}

    @analysis
    def reader(self) -> Reader:
        """The linear forms."""
        return Reader(self.numbers)

    @analysis
    def sums(self) -> Sums:
        """The sums, and what of them are adapters."""
        return Sums(self.graph, self.flow, self.reader, self.position, self.strict)

    @analysis
    def maps(self) -> AffineMaps:
        """The row-wise affine maps."""
        return AffineMaps(self.graph.nodes, self.flow)

    def recompute(self, random: bool) -> Recompute:
        """What backward would make again, after what passes have noted; `random`: masks too."""
        notes = self.notes
        noted = notes.reads_tokens, notes.rebuilt, notes.layers
        return Recompute(self.graph, self.flow, self.sizes.hint, random, *noted)
