"""Where the code stands: every folder of passes/ is a package, mapped, in the cache's key; only the editor edits."""

import re
from pathlib import Path

import pytest

from peft_fx import passes
from peft_fx.passes import pipeline

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = None  # type: ignore[assignment]

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "passes").rglob("*.py"))
ROOMS = sorted({p.parent.relative_to(ROOT / "passes") for p in FILES})
BESIDES = sorted({p.parent.name for p in (ROOT / "peft_fx").glob("*/__init__.py")} - {"passes"})
FOLDERS = [*(ROOT / "passes" / room for room in ROOMS), *(ROOT / "peft_fx" / name for name in BESIDES)]
EDITING = re.compile(
    r"\.(erase_node|replace_all_uses_with|replace_input_with|inserting_before|inserting_after|prepend|node_copy)\("
    r"|graph\.call_function\("
)


@pytest.mark.skipif(tomllib is None, reason="no reader of pyproject.toml")
def test_every_folder_is_installed() -> None:
    """As a package, from its own folder."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    names = {".".join(("peft_fx.passes", *room.parts)): "/".join(("passes", *room.parts)) for room in ROOMS}
    assert {n: d for n, d in told["package-dir"].items() if n != "peft_fx"} == names
    assert set(told["packages"]) == {"peft_fx", *(f"peft_fx.{name}" for name in BESIDES), *names}
    assert all((ROOT / folder / "__init__.py").is_file() for folder in names.values())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_the_map_of_a_folder_has_its_files(folder: Path) -> None:
    """Each file and each folder in it, and none besides."""
    told = (folder / "__init__.py").read_text().partition('"""')[2].partition('"""')[0]
    listed = re.findall(r"^ {0,4}(\w+(?:\.py|/))\s", told, re.M)
    files = {p.name for p in folder.glob("*.py")} - {"__init__.py"}
    folders = {f"{p.parent.name}/" for p in folder.glob("*/__init__.py")}
    assert sorted(listed) == sorted(files | folders)


def test_the_map_of_the_package_has_its_files() -> None:
    """docs/developing.md: each module and each folder of peft_fx/, once."""
    told = (ROOT / "docs" / "developing.md").read_text().partition("| in `peft_fx/`")[2].partition("\n\n")[0]
    package = ROOT / "peft_fx"
    modules = {p.stem for p in package.glob("*.py") if not p.stem.startswith("__")}
    assert sorted(re.findall(r"`([a-z_]+/?)`", told)) == sorted(modules | {f"{name}/" for name in BESIDES})


def test_only_the_editor_edits() -> None:
    """And what builds a loop's body, with an editor of its own."""
    editing = {p.name for p in FILES if EDITING.search(p.read_text())}
    assert editing <= {"editor.py"}


def test_files_hold_one_concept_each() -> None:
    long = {p.name: n for p in FILES if (n := len(p.read_text().splitlines())) > 320}
    assert not long


def test_passes_are_in_order() -> None:
    """Each behind those that it names; and a table out of order is told."""
    assert pipeline.in_order(pipeline.PASSES)
    assert not pipeline.in_order(pipeline.PASSES[::-1])
    assert {row.tier for row in pipeline.PASSES} <= set(pipeline.TIERS)


def test_the_docs_have_the_table() -> None:
    """docs/how-it-works.md: the passes in their order."""
    told = (ROOT / "docs" / "developing.md").read_text()
    assert re.findall(r"^\| +\d+ \| `(\w+)`", told, re.M) == [row.name for row in pipeline.PASSES]
    assert passes.__doc__
