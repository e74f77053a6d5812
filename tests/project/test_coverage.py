"""The committed table of coverage: what `explain` tells of every configuration and of some architectures is in it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.coverage import page
from bench.coverage.rows import SAME_EVERYWHERE, TABLES, Entry, explained, lacking, said, told_without_adapters
from bench.results import FOLDER

AGAIN = (
    "differs from bench/results/coverage.json. If that is meant, measure again, and commit that file and the page:"
    " pip install -e '.[bench,coverage]' && python -m bench coverage"
)
FEW = ("Llama", "DeBERTa-v2", "ConvNeXt")  # the others by the command alone
CASES = [("peft", name) for name in TABLES["peft"]] + [("architectures", name) for name in FEW]


@pytest.fixture(scope="module")
def committed() -> dict[tuple[str, str], dict[str, Any]]:
    rows = json.loads((FOLDER / "coverage.json").read_text())["rows"]
    return {(row["table"], row["name"]): row for row in rows}


@pytest.mark.parametrize(("table", "name"), CASES, ids=[name for _, name in CASES])
def test_coverage_is_as_committed(committed: dict, table: str, name: str) -> None:
    """Sites, forms and refusals: on fake tensors, nothing is computed."""
    entry, want = TABLES[table][name], committed[table, name]
    if reason := lacking(entry):
        pytest.skip(reason)
    assert counts(attempt(entry)) == counts(want), f"{name} {AGAIN}"


@pytest.mark.parametrize("name", FEW)
def test_of_an_architecture_without_adapters_nothing_is_told(name: str) -> None:
    if reason := lacking(TABLES["architectures"][name]):
        pytest.skip(reason)
    assert told_without_adapters(TABLES["architectures"][name]) == 0


def test_what_is_told_falsely_has_a_column() -> None:
    """Of the rows that were asked."""
    row = {"table": "architectures", "adapters": 1, "in_weights": 0, "graphs": 1, "forward": 1, "input_grad": 1}
    row |= {"refusals": {}, "kept": {}}
    rows = [row | {"name": "Llama", "plain": 3}, row | {"name": "BERT"}]
    text = page.table("architectures", rows, "github")
    cells = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in text.splitlines() if "|" in line}
    assert (cells[""], cells["Llama"], cells["BERT"]) == ("false", "3", "")


def attempt(entry: Entry) -> dict[str, Any]:
    try:
        return explained(entry)
    except Exception as error:
        return {"error": said(error)}


def counts(row: dict[str, Any]) -> dict[str, Any]:
    """What is the same on every machine; of an error, its kind."""
    found = {k: row[k] for k in SAME_EVERYWHERE if k in row}
    return found | {"error": row["error"].split(":")[0]} if "error" in row else found


def test_every_row_is_committed(committed: dict) -> None:
    """None is missing and none is left over."""
    assert set(committed) == {(table, name) for table, entries in TABLES.items() for name in entries}, AGAIN


def test_nothing_fell_back(committed: dict) -> None:
    """In no row did a pass of ours fail."""
    assert [name for (_, name), row in committed.items() if row.get("failures")] == []
