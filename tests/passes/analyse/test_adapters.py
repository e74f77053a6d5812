"""What an adapter is: nothing is told of layers that are trained, all that is an adapter is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from torch import Tensor, nn

from peft_fx.passes.findings import Outcome
from tests.support import joint
from tests.support.oracle import assert_bit_equal, integers, run, weight_form
from tests.support.plain_models import MODELS
from tests.support.spellings import K, Lora, N, R, scale_right, tensor, trained

NORMS = (nn.LayerNorm, nn.BatchNorm2d)

# Which of a model's parameters are trained, by their module and their name in it.
TRAINED: dict[str, Callable[[nn.Module, str], bool]] = {
    "all": lambda module, name: True,
    "none": lambda module, name: False,
    "biases": lambda module, name: name == "bias",
    "norms": lambda module, name: isinstance(module, NORMS),
    "norms_and_tables": lambda module, name: isinstance(module, (*NORMS, nn.Embedding)),
    "head": lambda module, name: getattr(module, "out_features", 0) in (5, 50),
}


def told(module: nn.Module, *inputs: Tensor, **named: object) -> Outcome:
    torch._dynamo.reset()
    return joint.capture(module, *inputs, **named).rewritten(form="weight", keep="inductor", chunk_loss=False)[1]


def names(found: Outcome) -> list[tuple[str, str]]:
    return [(s.name, s.forward) for s in found.sites] + [(r.name, r.code) for r in found.refusals]


@pytest.mark.parametrize("name", MODELS)
def test_of_a_model_without_adapters_nothing_is_told(name: str) -> None:
    """Trained in full, in part, or not at all; in evaluation, where a batch norm is a vector, too."""
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    for which, is_trained in TRAINED.items():
        model = make().train(which != "norms")
        for module in model.modules():
            for parameter_name, p in module.named_parameters(recurse=False):
                p.requires_grad_(is_trained(module, parameter_name))
        assert names(told(model, inputs())) == [], which


def test_an_adapter_whose_weight_is_trained_too_is_one() -> None:
    """A LoRA is linear and narrow, so that it is known by its form."""
    module = Lora(scale_right)
    module.W.requires_grad_()
    assert names(told(module, tensor(2, 17, K))) == [("W", "weight")]


def test_a_rank_may_be_larger_than_a_layer_is_wide() -> None:
    """What reads the layer's input and is added to its product is an adapter at any size, if the layer is frozen."""
    assert names(told(Lora(scale_right, N=2, r=8), tensor(2, 17, K))) == [("W", "weight")]


class Dropped(Lora):
    """Its adapter reads a dropped-out copy of its input."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x @ self.W + (F.dropout(x, 0.5) @ self.A) @ self.B


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize(("n", "r"), [(N, R), (2, 8), (N, K + 4), (K, R)])
def test_behind_dropout_an_adapter_is_refused_at_any_size(n: int, r: int, is_trained: bool) -> None:
    module = Dropped(scale_right, N=n, r=r)
    module.W.requires_grad_(is_trained and r < min(n, K))
    assert names(told(module, tensor(17, K))) == [("W", "dropout")]


def test_beside_full_fine_tuning_only_the_adapters_are_told() -> None:
    layers = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 5))
    model = get_peft_model(layers, LoraConfig(r=4, target_modules=["0"], modules_to_save=["1", "3", "4"]))
    with torch.no_grad():
        [p.normal_() for name, p in model.named_parameters() if "lora_B" in name]
    assert names(told(model, torch.randn(7, 16))) == [("base_model.model.0", "weight")]


# ------------------------------------------------------------------------------------------- adapters of some rows


class Rows(Lora):
    """A layer with two adapters, and which rows they are of."""

    def __init__(self, spell: Callable[[Rows, Tensor], Tensor]):
        super().__init__(scale_right)
        self.spell, self.A2, self.B2 = spell, trained(K, R), trained(R, N)  # type: ignore[assignment]
        self.v, self.u = trained(1, N), trained(1, K)
        self.register_buffer("i", torch.tensor([0, 2]))
        self.register_buffer("m", torch.tensor([True, False, True, False]))

    def forward(self, x: Tensor) -> Tensor:
        return self.spell(self, x)  # type: ignore[call-arg, arg-type]


def slices(m, x):
    y = x @ m.W
    y[:2] += x[:2] @ m.A @ m.B
    return y


def slices_of_two(m, x):
    y = x @ m.W
    y[:2] += x[:2] @ m.A @ m.B
    y[2:] += x[2:] @ m.A2 @ m.B2
    return y


def last_tokens(m, x):
    y = x @ m.W
    y[:, -3:] += x[:, -3:] @ m.A @ m.B
    return y


def one_row(m, x):
    y = x @ m.W
    y[1] += x[1] @ m.A @ m.B
    return y


def numbers(m, x):
    y = x @ m.W
    y[m.i] += x[m.i] @ m.A @ m.B
    return y


def added_at_numbers(m, x):
    return (x @ m.W).index_add(0, m.i, x[m.i] @ m.A @ m.B)


def scattered(m, x):
    delta = x[m.i] @ m.A @ m.B
    return (x @ m.W).scatter_add(0, m.i[:, None, None].expand_as(delta), delta)


def put_among_zeros(m, x):
    zeros = torch.zeros(*x.shape[:-1], N, dtype=x.dtype)
    zeros[m.i] = x[m.i] @ m.A @ m.B
    return x @ m.W + zeros


def side_by_side(m, x):
    first, second = (x @ m.W).split(2)
    return torch.cat([first + x[:2] @ m.A @ m.B, second])


def masked(m, x):
    return x @ m.W + torch.where(m.m[:, None, None], x @ m.A @ m.B, 0.0)


def filled(m, x):
    return x @ m.W + (x @ m.A @ m.B).masked_fill(~m.m[:, None, None], 0)


def chosen(m, x):
    y = x @ m.W
    return torch.where(m.m[:, None, None], y + x @ m.A @ m.B, y)


def nonlinear(m, x):
    y = x @ m.W
    y[:2] += torch.relu(x[:2] @ m.A) @ m.B
    return y


def scaled(m, x):
    y = x @ m.W
    y[:2] *= m.v
    return y


def scaled_one(m, x):
    y = x @ m.W
    y[1].mul_(m.v)
    return y


def scaled_at_numbers(m, x):
    y = x @ m.W
    y[m.i] = y[m.i] * m.v
    return y


def scaled_where(m, x):
    y = x @ m.W
    return torch.where(m.m[:, None, None], y * m.v, y)


def scaled_beside(m, x):
    first, second = (x @ m.W).split(2)
    return torch.cat([first * m.v, second])


def scaled_before(m, x):
    x = x.clone()
    x[:, -3:] *= m.u
    return x @ m.W


BY_ROWS = {
    **dict.fromkeys((scaled, scaled_one, scaled_at_numbers, scaled_where, scaled_beside, scaled_before), "shape"),
    **dict.fromkeys((slices, slices_of_two, last_tokens, one_row, numbers, added_at_numbers, scattered), "shape"),
    **dict.fromkeys((put_among_zeros, side_by_side, masked, filled), "shape"),
    chosen: "shared",
    nonlinear: "nonlinear",
}


@pytest.mark.parametrize("spell", BY_ROWS, ids=lambda spell: spell.__name__)
def test_an_adapter_of_some_rows_is_refused(spell: Callable) -> None:
    assert names(told(Rows(spell), tensor(4, 7, K))) == [("W", BY_ROWS[spell])]


class Pooled(nn.Module):
    """A trained norm between two frozen layers, of which the second reads one token."""

    def __init__(self, norm: nn.Module, first: bool):
        super().__init__()
        self.up, self.norm, self.head, self.first = nn.Linear(K, N), norm, nn.Linear(N, 5), first
        self.up.requires_grad_(False)
        self.head.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.head(self.norm(y[:, 0]) if self.first else self.norm(y)[:, 0])


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_of_which_one_token_is_read_is_no_adapter(norm: type, first: bool) -> None:
    assert names(told(Pooled(norm(N), first), tensor(4, 7, K))) == []


class Sequential(nn.Module):
    """Houlsby's adapter: behind a frozen layer, and added to what that gives."""

    def __init__(self, bias: bool, act: Callable[[Tensor], Tensor]):
        super().__init__()
        self.base = nn.Linear(K, N, bias=bias).requires_grad_(False)
        self.down, self.up, self.act = nn.Linear(N, R), nn.Linear(R, N), act

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.up(self.act(self.down(y)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", [torch.relu, nn.functional.gelu, torch.tanh])
def test_a_bottleneck_behind_a_layer_is_refused(bias: bool, act: Callable) -> None:
    assert names(told(Sequential(bias, act), tensor(4, 7, K))) == [("base", "nonlinear")]


class Positions(nn.Module):
    """A trained table of positions, added to what a layer gives; the positions are a buffer of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.table = nn.Linear(K, N), nn.Embedding(7, N)
        self.register_buffer("positions", torch.arange(7)[None])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.cat([x[:, :1] @ self.up.weight.T, self.up(x[:, 1:])], 1) + self.table(self.positions))


def test_places_in_a_table_are_no_quantised_weight() -> None:
    assert names(told(Positions(), tensor(4, 7, K))) == []


class Halves(nn.Module):
    """What a frozen layer gives, and what a trained matrix of the same module makes of its input, both returned: as in
    front of a graph break inside an adapter."""

    def __init__(self, width: int):
        super().__init__()
        self.layer = nn.Module()
        self.layer.W, self.layer.A = trained(K, N).requires_grad_(False), trained(K, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.layer.W, x @ self.layer.A


def test_half_of_an_adapter_is_one_and_a_layer_is_none() -> None:
    assert names(told(Halves(R), tensor(4, 7, K))) == [("layer.W", "different_input")]
    assert names(told(Halves(2 * N), tensor(4, 7, K))) == []


class Drawn(nn.Module):
    """A product with a trained matrix and a mask of its own in each call, and with another matrix behind it."""

    def __init__(self, width: int):
        super().__init__()
        self.W, self.A, self.B = trained(K, N).requires_grad_(False), trained(K, width), trained(width, N)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x @ self.W + torch.relu(x) @ (self.A * mask) @ self.B


def test_factors_that_change_are_an_adapters_where_they_are_narrow() -> None:
    for width, found in ((R, {"input_dependent"}), (2 * N, set())):
        assert {code for _, code in names(told(Drawn(width), tensor(4, 7, K), tensor(K, width)))} == found


def test_an_adapter_of_some_rows_is_left_as_it_is() -> None:
    module, inputs = integers(Rows(numbers), 1), (tensor(4, 7, K),)
    integers(inputs, 2)
    assert_bit_equal(run(weight_form(module), module, inputs), run(module, module, inputs))


class Words(nn.Module):
    """A table, a layer, and a head that may be tied to the table."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(64, K), nn.Linear(K, K), nn.Linear(K, 64, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, **kwargs: object) -> Tensor:
        return self.head(torch.relu(self.up(self.embed(ids))))


def test_a_batch_of_mixed_adapters_is_refused() -> None:
    """Neither of the two is trained alone, and one of them not at all."""
    model = get_peft_model(Words(), LoraConfig(r=4, target_modules=["up", "embed"]))
    model.add_adapter("other", LoraConfig(r=4, target_modules=["up", "embed"]))
    found = told(model.eval(), torch.randint(64, (2, 7)), adapter_names=["default", "other"])
    told_of = [(name.rpartition(".")[2], code) for name, code in names(found)]
    assert sorted(told_of) == [("embed", "shape"), ("up", "shape")]


@pytest.mark.parametrize("alone", [False, True], ids=["beside_lora", "alone"])
def test_trainable_tokens_are_told(alone: bool) -> None:
    lora = LoraConfig(r=4, target_modules=["up"], trainable_token_indices={"embed": [1, 5]})
    config = TrainableTokensConfig(target_modules=["embed"], token_indices=[1, 5]) if alone else lora
    found = told(get_peft_model(Words(), config), torch.randint(64, (2, 7)))
    assert [r.code for r in found.refusals] == ["shape"]
    assert "embed" in found.refusals[0].name
    assert "already in weight form" in found.refusals[0].detail
    assert len(found.sites) == (not alone)
