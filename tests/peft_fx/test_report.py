"""The report for people: the page, in a browser where there is one; the nodes of one adapter; what keeps each byte."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import peft_fx
from peft_fx.reports import Report
from tests.support.peft_models import adapt, mlp
from tests.support.spellings import SPELLINGS, K, Stack, scale_right, x

WEIGHT = {"peft_fx.form": "weight"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
FLAGS = (
    *("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "disable-sync"),
    *("disable-component-update", "virtual-time-budget=5000", "proxy-server=127.0.0.1:9", "dump-dom"),
)


def batch(tokens: int) -> Tensor:
    return torch.randn(tokens, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()


def llama(layers: int) -> nn.Module:
    """A small one with LoRA on all linear layers, without weights."""
    config = tf.LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1)
    config.num_hidden_layers, config.vocab_size, config.use_cache = layers, 128, False
    with torch.device("meta"):
        base = tf.LlamaForCausalLM(config).bfloat16()
        return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))


def explained(layers: int) -> Report:
    ids = torch.zeros(1, 128, dtype=torch.long, device="meta")
    return peft_fx.explain(llama(layers), input_ids=ids, labels=ids, options=WEIGHT)


# ------------------------------------------------------------------------------------------------------ the page


def in_browser(page: str, script: str, folder: Path) -> Any:
    """What a script returns that runs in a page, opened from a file by a browser without a window; the network is a
    proxy that does not exist."""
    assert BROWSER is not None
    run = f"<script>document.title = 'done:' + JSON.stringify((() => {{{script}}})())</script></body>"
    file = folder / "report.html"
    file.write_text(page.replace("</body>", run), encoding="utf-8")
    flags = [f"--{flag}" for flag in (*FLAGS, f"user-data-dir={folder / 'profile'}")]
    done = subprocess.run([BROWSER, *flags, file.as_uri()], capture_output=True, text=True, timeout=300, check=False)
    found = re.search("<title>done:(.*?)</title>", done.stdout, re.S)
    assert found, f"the script did not end: {done.stderr[-2000:]}"
    return json.loads(html.unescape(found.group(1)))


@needs_browser
def test_the_page_sorts_searches_and_opens_a_site(tmp_path: Path) -> None:
    """28 adapters, by clicks and typing, as a reader would."""
    report = explained(layers=4)
    assert len(report.sites) == 28
    site = next(s for s in report.sites if s.name.endswith("layers.2.self_attn.k_proj"))
    script = """
      const all = (what) => [...document.querySelectorAll(what)];
      const names = () => all("#sites tr.row").map((tr) => tr.dataset.name);
      const column = (title) => all("#sites th").find((th) => th.textContent === title);
      const search = document.getElementById("search");
      const type = (text) => { search.value = text; search.dispatchEvent(new Event("input")); };
      const told = { all: names() };
      column("T × K → N").firstChild.click();
      told.ascending = names(), told.sort = column("T × K → N").getAttribute("aria-sort");
      column("T × K → N").firstChild.click();
      told.descending = names();
      type("layers.2 MLP");
      told.found = names();
      type("no such thing");
      told.nothing = names(), told.said = document.querySelector("#sites tbody").textContent;
      type("LAYERS.2.self_attn.k_proj");
      told.closed = all(".detail").length;
      document.querySelector("#sites tr.row").click();
      told.detail = document.querySelector(".detail").textContent;
      told.nodes = all(".detail pre").map((pre) => pre.textContent);
      told.gone = all(".detail .gone").map((line) => line.textContent);
      told.come = all(".detail .come").map((line) => line.textContent);
      document.querySelector("#sites tr.row").dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
      told.closed += all(".detail").length;
      told.bars = all("#kept .track").map((t) => [...t.children].map((i) => i.title));
      told.head = document.querySelector(".tiles").textContent;
      return told;
    """
    told = in_browser(report.to_html(), script, tmp_path)
    names = [s.name for s in report.sites]
    sizes = {s.name: s.tokens * s.in_features * s.out_features for s in report.sites}
    assert told["all"] == names
    assert len(set(sizes.values())) > 2
    assert told["ascending"] == sorted(names, key=sizes.__getitem__)
    assert told["descending"] == sorted(names, key=lambda n: -sizes[n])
    assert told["sort"] == "ascending"
    assert sorted(told["found"]) == sorted(n for n in names if "layers.2.mlp" in n)
    assert told["nothing"] == []
    assert told["said"] == "Nothing matches."
    assert told["closed"] == 0
    for text in (*site.algebra["forward"], *site.algebra["input_grad"], site.reason, "s = 2"):
        assert text in told["detail"]
    nodes = report.nodes[site.name]
    for shown, label in zip(told["nodes"], ("before", "after"), strict=True):
        assert all(line in shown for direction in nodes[label].values() for line in direction)
    assert any("mm(" in line for line in told["gone"])
    assert any("lora_B.default.weight, lora_A.default.weight" in line for line in told["come"])
    assert [len(bars) for bars in told["bars"]] == [len(report.components[k]) for k in ("before", "after")]
    assert told["head"].startswith("28 of 28")


HOSTILE = """</script><script>document.title='hit'</script><img src=x onerror="document.title='hit'">'&amp;`${1}"""


def hostile() -> Report:
    site = peft_fx.Site(HOSTILE, HOSTILE, 1, 2, 3, 4, HOSTILE, "weight", "none", "dense", HOSTILE)
    refusal = peft_fx.Refusal(HOSTILE, HOSTILE, HOSTILE)
    nodes = {HOSTILE: {k: {"forward": [HOSTILE], "backward": []} for k in ("before", "after")}}
    breaks = [HOSTILE, f"{HOSTILE}\n  Hint: peft_fx.prepare(model) cures {HOSTILE}"]
    return Report([site], [refusal], 3, breaks, failures=[HOSTILE], nodes=nodes)


def test_names_are_no_markup() -> None:
    """Whatever a module is called: the page's markup is the template's, and the data comes back as it was."""
    template, page = Report().to_html(), hostile().to_html()
    tags = re.compile("<[^>]*>")
    assert tags.findall(page) == tags.findall(template)
    (data,) = re.findall('id="report">(.*?)</script>', page, re.S)
    assert json.loads(data)["sites"][0]["name"] == HOSTILE
    assert html.unescape(re.findall('srcdoc="([^"]*)"', hostile()._repr_html_())[0]) == page


@needs_browser
def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    """In the tables, in the details, and nothing of them runs; a graph break's cure is told beside it."""
    script = """
      document.querySelectorAll("tr.row").forEach((tr) => tr.click());
      const texts = [...document.querySelectorAll("#main td, #main pre span, #main pre")].map((e) => e.textContent);
      return [document.title, document.images.length, texts, document.querySelector(".cure").textContent];
    """
    title, images, texts, cure = in_browser(hostile().to_html(), script, tmp_path)
    assert (title, images) == ("peft_fx report", 0)
    assert texts.count(HOSTILE) >= 8  # a site's name and method, a refusal's name, code and detail, breaks, a failure
    assert cure == f"Cure: peft_fx.prepare(model) cures {HOSTILE}"


def test_the_page_needs_nothing_else() -> None:
    """No address, no other file, nothing loaded; the template is all there is besides the data."""
    page = peft_fx.explain(adapt(mlp()), batch(50)).to_html()
    assert not re.search(r"https?:|\bsrc=|@import|url\(|<link|\bfetch\(|\bimport\(", page)
    assert len(Report().to_html()) < 30_000


# --------------------------------------------------------------------------------------------- one adapter's nodes


def test_nodes_are_the_modules_own() -> None:
    """As written there are the adapter's two products over the tokens; in weight form forward has none but W′'s own,
    and what the adapter's gradient reads."""
    report = peft_fx.explain(adapt(mlp()), batch(50), options=WEIGHT)
    for site in report.sites:
        nodes = report.nodes[site.name]
        before, after = (nodes[label]["forward"] for label in ("before", "after"))
        wide = re.compile(rf": f32\[{site.tokens}, {site.out_features}\] = (add)?mm\(")
        assert len([line for line in before if wide.search(line)]) == 2
        assert len([line for line in after if wide.search(line)]) == 1
        assert any(": f32[50, 8] = mm(" in line for line in before)
        assert all("rebuilt" in line for line in after if ": f32[50, 8] = mm(" in line)
        product = rf": f64\[{site.out_features}, {site.in_features}\] = mm\(.*rebuilt"  # of fp32 factors
        assert any(re.search(product, line) for line in after)
        assert all(nodes[label]["backward"] for label in ("before", "after"))
    everything = [line for n in report.nodes.values() for line in n["before"]["forward"]]
    assert len(set(everything)) == len(everything), "a node in the lists of two modules"


def test_diff_prints_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    """By a part of the name, with … for what is left out; - before and + after."""
    report = peft_fx.explain(adapt(mlp()), batch(50), options=WEIGHT)
    outputs = []
    for name in ("base_model.model.2", "model.2", "base…2"):
        report.diff(name)
        outputs.append(capsys.readouterr().out)
    assert len(set(outputs)) == 1
    lines = outputs[0].splitlines()
    assert lines[0] == "base_model.model.2"
    marks = {line[0] for line in lines[1:] if line}
    assert marks >= {"-", "+", " "}
    nodes = report.nodes["base_model.model.2"]
    own = [line for label in ("before", "after") for d in nodes[label].values() for line in d]
    assert sorted(line[2:] for line in lines if line[:2] in ("- ", "+ ", "  ")) == sorted(own)


def test_diff_names_what_there_is() -> None:
    """Where a name fits none or several; and where the report is of a compile, the call to make."""
    model = adapt(mlp())
    report = peft_fx.explain(model, batch(50))
    with pytest.raises(KeyError, match=r"no adapter is called 'q_proj': base_model\.model\.0"):
        report.diff("q_proj")
    with pytest.raises(KeyError, match="several adapters are called"):
        report.diff("base_model")
    f = torch.compile(model, backend=peft_fx.backend, options={"peft_fx.lowering": "aot_eager"})
    f(batch(50)).sum().backward()
    with pytest.raises(ValueError, match=r"peft_fx\.explain\(model"):
        peft_fx.explain(f).diff("base_model.model.0")


def test_a_graph_without_modules_has_its_nodes() -> None:
    """Of a plain function all of them, also where nothing is trained; of parameters in one module, that module's."""
    tensors = [torch.randn(*s) for s in ((64, 32), (32, 24), (32, 3), (3, 24))]
    report = peft_fx.explain(lambda *args: scale_right(*args, 2.0), *tensors, options=WEIGHT)
    ((nodes,),) = (report.nodes.values(),)
    assert len([line for line in nodes["before"]["forward"] if "mm(" in line]) == 3
    assert len([line for line in nodes["after"]["forward"] if "mm(" in line]) == 2
    assert nodes["after"]["backward"] == []
    stack = peft_fx.explain(Stack(), *x(2, 17, K)(), options=WEIGHT)
    assert [len([i for i in n["before"]["forward"] if "mm(" in i]) for n in stack.nodes.values()] == [3, 3]


# ------------------------------------------------------------------------------------------------------ the algebra

ALGEBRA = {
    "scale_right": ("y = xW + s(xA)B", "y = x(W + sAB)", "dx = dy·Wᵀ + s(dy·Bᵀ)Aᵀ", "dx = dy(W + sAB)ᵀ"),
    "weight_on_the_left": ("y = Wx + s·B(Ax)", "y = (W + sBA)x", "dx = Wᵀ·dy + s·Aᵀ(Bᵀ·dy)", "dx = (W + sBA)ᵀ·dy"),
    "three_factors": ("y = xW + s((xA)M)B", "y = x(W + sAMB)"),
    "two_adapters": ("y = xW + s₁(xA₁)B₁ + s₂(xA₂)B₂", "y = x(W + s₁A₁B₁ + s₂A₂B₂)"),
}


@pytest.mark.parametrize("name", ALGEBRA)
def test_the_algebra_is_that_of_the_graph(name: str) -> None:
    """In the order and on the side that it is written on; the same twice where it stays as written."""
    case = next(c for c in SPELLINGS if c.id == name)
    module, inputs = case.make()
    for form in ("weight", "activation"):
        (site, *_) = peft_fx.explain(module, *inputs, options={"peft_fx.form": form}).sites
        pairs = [site.algebra[k] for k in ("forward", "input_grad") if k in site.algebra]
        wanted = ALGEBRA[name]
        for (before, after), (written, merged) in zip(pairs, zip(wanted[::2], wanted[1::2], strict=True), strict=False):
            assert (before, after) == (written, merged if form == "weight" else written)


# ---------------------------------------------------------------------------------------------- what keeps each byte


def test_bytes_are_kept_by_what_reads_them() -> None:
    """The parts add up; adapters alone keep much before and next to nothing after, and the frozen model's own parts
    stay. The MLP's is what silu and its product read, two of the inner width, the norms' what they normalise."""
    report = explained(layers=1)
    parts = report.components
    assert {k: sum(v.values()) for k, v in parts.items()} == report.kept_bytes
    assert parts["before"]["adapters"] > sum(parts["before"].values()) / 4
    assert parts["after"].get("adapters", 0) < sum(parts["after"].values()) / 100
    for own in ("attention", "MLP", "logits and loss"):
        assert 0 < parts["before"][own] == parts["after"][own]
    assert parts["after"]["MLP"] == 2 * 128 * 96 * 2  # gate and up, T, width, bytes
    assert parts["after"]["norms"] >= 2 * 128 * 64 * 2


def test_a_report_of_a_compile_has_a_page_too() -> None:
    """Without bars and nodes, which need the call to be traced again."""
    model: Callable[..., Any] = adapt(mlp())
    f = torch.compile(model, backend=peft_fx.backend, options={"peft_fx.lowering": "aot_eager"})
    f(batch(50)).sum().backward()
    report = peft_fx.explain(f)
    assert report.components == report.nodes == {}
    assert "base_model.model.0" in report.to_html()
