"""The passes make the same graphs as before, node by node."""

import pytest
import torch

from tests.golden_graphs import FOLDER, GOLDENS, VERSION, Golden

CHANGED = "is not as before. If that is meant, `python -m tests.golden_graphs`, and the commit says why"
other_version = pytest.mark.skipif(
    not torch.__version__.startswith(VERSION), reason=f"graphs of torch {VERSION}: others are decomposed otherwise"
)


@other_version
@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.name)
def test_a_graph_is_as_before(golden: Golden) -> None:
    assert golden.text() == golden.path.read_text(), f"{golden.name} {CHANGED}"


def test_each_text_has_its_graph() -> None:
    assert {golden.path for golden in GOLDENS} == set(FOLDER.glob("*.txt"))
    assert len(GOLDENS) > 60
