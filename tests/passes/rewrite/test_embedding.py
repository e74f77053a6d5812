"""LoRA on tables of rows, `W[i] + s·A[i]·B`: W' is the whole table, built anew for the few rows looked up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

import peft_fx
from tests.support.oracle import assert_bit_equal, gate, integers, run, weight_form
from tests.support.spellings import Lora, frozen, scale_right, trained

V, N, R = 40, 24, 3


class Table(nn.Module):
    """As PEFT writes it."""

    def __init__(self, rows: int = V):
        super().__init__()
        self.W, self.A, self.B = frozen(rows, N), trained(rows, R), trained(R, N, gain=0.25)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.W) + (F.embedding(ids, self.A) @ self.B) * 2.0


class Tied(nn.Module):
    """One weight as table and as head, an adapter on either or on both."""

    def __init__(self, table: bool, head: bool):
        super().__init__()
        self.table, self.mid = Table(), nn.Linear(N, N)
        self.on_table, self.on_head = table, head
        self.A, self.B = trained(N, R), trained(R, V, gain=0.25)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.relu(self.mid(self.table(ids) if self.on_table else F.embedding(ids, self.table.W)))
        y = h @ self.table.W.t()
        return y + (h @ self.A) @ self.B if self.on_head else y


class Positions(nn.Module):
    """The layer reads a table of positions alone, as in DeBERTa: what it gives depends on no input."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.layer = frozen(17, N), Lora(scale_right, K=N, N=N)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.layer(self.positions).t()


def ids(*shape: int) -> tuple[Tensor]:
    return (torch.randint(V, shape, generator=torch.Generator().manual_seed(1)),)


def test_rewritten_is_bit_equal_on_integers() -> None:
    """y and every gradient, with one lookup of W' in forward."""
    module, inputs = integers(Table().double(), 1), ids(3, 50)
    f = weight_form(module)
    assert_bit_equal(run(f, module, inputs), run(module, module, inputs))
    report = peft_fx.explain(f)
    assert [(s.name, s.forward, s.input_grad, s.rank) for s in report.sites] == [("W", "weight", "none", R)]
    assert (report.sites[0].tokens, report.sites[0].in_features, report.sites[0].out_features) == (150, V, N)
    assert report.refusals == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rewritten_is_no_worse_on_floats(dtype: torch.dtype) -> None:
    module = Table().to(dtype)
    gate(weight_form(module), module, ids(3, 50))


@pytest.mark.parametrize(("rows", "form"), [(16 * 1024, "activation"), (64, "weight")])
@pytest.mark.parametrize("training", [True, False])
def test_the_price_counts_the_rows_of_the_table(rows: int, form: str, training: bool) -> None:
    """A site either way, the price its reason: the table is built for fewer tokens than it has rows, or for more."""
    with torch.set_grad_enabled(training):
        (site,) = peft_fx.explain(Table(rows), torch.zeros(1, 1024, dtype=torch.long)).sites
    assert site.forward == form
    assert site.reason.startswith("cheaper: weight ")


@pytest.mark.parametrize(("table", "head"), [(True, False), (False, True), (True, True)])
def test_tied_weights(table: bool, head: bool) -> None:
    """Each use of the weight has its own W', the other one what was written."""
    module, inputs = integers(Tied(table, head).double(), 1), ids(2, 17)
    f = weight_form(module)
    assert_bit_equal(run(f, module, inputs), run(module, module, inputs))
    report = peft_fx.explain(f)
    assert [s.forward for s in report.sites] == ["weight"] * (table + head), str(report)
    assert [s.input_grad for s in report.sites] == ["none"] * table + ["weight"] * head


def test_a_table_is_an_input_too() -> None:
    """What a layer computes of a table of another module has tokens: the table's rows."""
    module, inputs = integers(Positions().double(), 1), (torch.ones(5, N, dtype=torch.float64, requires_grad=True),)
    integers(inputs, 2)
    f = weight_form(module)
    assert_bit_equal(run(f, module, inputs), run(module, module, inputs))
    (site,) = peft_fx.explain(f).sites
    assert (site.name, site.tokens, site.forward, site.input_grad) == ("layer.W", 17, "weight", "none")


def test_of_peft() -> None:
    """Every adapter once: LoRA's table a site, DoRA's a refusal, the head a site."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(512, N), nn.Linear(N, 512, bias=False)

        def forward(self, ids: Tensor) -> Any:
            return self.head(self.embed(ids))

    for dora in (False, True):
        config = LoraConfig(r=R, target_modules=["embed", "head"], use_dora=dora)
        model = peft_fx.prepare(get_peft_model(Words(), config))
        report = peft_fx.explain(model, *ids(2, 64))
        assert [s.name.split(".")[-1] for s in report.sites] == (["head"] if dora else ["embed", "head"])
        assert [(r.name.split(".")[-1], r.code) for r in report.refusals] == ([("embed", "shape")] if dora else [])
