"""Room for Python's frames: no memory is mapped again in each turn of a loop, however deep it runs."""

import resource

import pytest

from peft_fx.frames import with_room

TURNS = 200
DEEP = 200  # frames: several chunks of 16 KB


def _leaf() -> None:
    pass


# a larger frame than those above it: at some depth it is the one that a chunk has no place for
_leaf.__code__ = _leaf.__code__.replace(co_stacksize=100)


def _faults_at(depth: int) -> int:
    """Pages that a loop of calls touches for the first time, so many frames down."""
    if depth:
        return _faults_at(depth - 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(TURNS):
        _leaf()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _most() -> int:
    return max(map(_faults_at, range(DEEP)))


def test_no_depth_has_a_loop_map_memory_in_each_turn():
    roomy = with_room(_most)
    assert roomy() < TURNS / 4
    assert roomy.__name__ == "_most"  # a function of its own name to users


def test_a_failure_and_arguments_pass_through():
    @with_room
    def divided(a: int, *, by: int) -> int:
        return a // by

    assert divided(7, by=2) == 3
    with pytest.raises(ZeroDivisionError):
        divided(7, by=0)
