"""The pages say what is: options as they are, commands that parse, names and files that exist."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import peft_fx
from peft_fx.__main__ import parser
from peft_fx.options import CHOICES, OTHERS, PREFIX, Options
from peft_fx.passes import findings
from peft_fx.passes.keep.policies import POLICIES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [p for folder in ("peft_fx", "passes") for p in (ROOT / folder).rglob("*.py")]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# ------------------------------------------------------------------------------------------------------------ options


def described() -> dict[str, list[str]]:
    """The options of docs/options.md, with the values in the line below each heading."""
    text = (ROOT / "docs" / "options.md").read_text()
    found = re.findall(rf"^### `{re.escape(PREFIX)}(\w+)`\n\n(.*)$", text, re.M)
    return {name: re.findall("`([^`]*)`", values) for name, values in found}


def test_every_option_is_described() -> None:
    """With all its values, the default first, and none that does not exist."""
    told, defaults = described(), Options()
    assert set(told) == {*CHOICES, *OTHERS} == {f.name for f in fields(Options)} - {"inductor"}
    for name, values in told.items():
        default = getattr(defaults, name)
        assert values[0] == str(list(default) if default == () else default)
        assert name not in CHOICES or values == [str(c) for c in CHOICES[name]]


def test_every_environment_variable_is_described() -> None:
    """That the code reads."""
    read = {name for p in SOURCES for name in re.findall(r"environ(?:\.get\(|\[)\"(PEFT_FX_\w+)", p.read_text())}
    text = (ROOT / "docs" / "options.md").read_text()
    assert len(read) >= 2
    assert all(f"`{name}" in text for name in read)


# ------------------------------------------------------------------------------------------------------------- limits


def test_every_code_is_described() -> None:
    """Of a refusal: by the table's own words."""
    told = dict(re.findall(r"^\| `(\w+)` +\| (.*) \|$", (ROOT / "docs" / "limits.md").read_text(), re.M))
    assert {code: why.strip() for code, why in told.items()} == findings.REFUSALS
    source = "".join(p.read_text() for p in SOURCES if p.name != "findings.py")
    unused = [code for code in told if f'"{code}"' not in source]
    wanted = [code for code, why in told.items() if why.startswith("of no adapter yet")]
    assert unused == wanted, "a code that no refusal has: add a finder or a guard that makes it"


def test_every_keep_policy_is_described() -> None:
    """In its own page's first table, in the order of `POLICIES`."""
    page = (ROOT / "docs" / "keep-policies.md").read_text().partition("## ")[0]
    assert re.findall(r"^\| `(\w+)` ", page, re.M) == list(POLICIES), "a row for each in docs/keep-policies.md"


# --------------------------------------------------------------------------------------------------------- everything


@pages
def test_links_lead_somewhere(page: Path) -> None:
    """To a file of the repository, and where there is an anchor, to a heading of it."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if anchor else []
            assert not anchor or anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], link


@pages
def test_commands_are_taken(page: Path) -> None:
    """Each call of `python -m peft_fx` has a command and arguments that there are."""
    for line in re.findall(r"-m peft_fx ([^`\n]*)", page.read_text()):
        words = shlex.split(line.split("&&")[0], comments=True)
        words = [w for w in words if w != "--help"]
        required = {"explain": ["CONFIG"], "estimate": ["CONFIG"]}.get(words[0], []) if len(words) == 1 else []
        if words:
            parser().parse_args([*words, *required])


@pages
def test_names_exist(page: Path) -> None:
    """Of what is called `peft_fx.something`, and of the options named in strings."""
    text = page.read_text()
    for name in re.findall(r"(?<![\w\"'`])peft_fx\.(\w+)\(|`peft_fx\.(\w+)\(", text):
        assert hasattr(peft_fx, "".join(name)), name
    for option in re.findall(r"[\"`]peft_fx\.(\w+)[\"`]", text):
        assert option in {*CHOICES, *OTHERS} or hasattr(peft_fx, option), option


def test_the_readme_is_short() -> None:
    """One figure; what is long is in other pages, and each of them is led to by some page."""
    text = (ROOT / "README.md").read_text()
    assert len(re.findall(r"^!\[", text, re.M)) == 1
    assert len(text.splitlines()) < 100
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([\w/.-]+\.md)", page.read_text())]
    assert {(page.parent / link).resolve() for page, link in links} >= set(PAGES[1:])
