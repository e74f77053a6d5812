"""The models of zoo/ are what they are said to be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from zoo import handwritten
from zoo.models import make_base, make_batch, setup_of, with_adapters


@pytest.mark.parametrize("forward", [handwritten.weight_form, handwritten.low_rank_form])
@pytest.mark.parametrize("model", ["llama-tiny", "gpt2", "roberta"])
def test_hand_written_layers_compute_what_pefts_do(model: str, forward: Callable[..., Any]) -> None:
    """The loss and every gradient, in float64; of GPT-2's Conv1D and of layers with a bias too."""
    setup = setup_of(model, layers=1, hidden=64, tokens=16, vocab=64, dtype="fp32")
    plain = with_adapters(make_base(setup), setup).double()
    other = handwritten.forward_by(copy.deepcopy(plain), forward)
    want, got = (step(m, make_batch(setup)) for m in (plain, other))
    assert want.keys() == got.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12)


def step(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("model", ["llama-tiny", "gpt2", "t5", "vit"])
def test_a_setup_is_of_its_sizes(model: str) -> None:
    """Under whatever names a config has for them; and nothing of the base is dropped."""
    setup = setup_of(model, layers=3, hidden=64, tokens=25, vocab=96)
    base = make_base(setup)
    config = base.config
    found = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    assert found == (64, 3, setup.heads)
    assert (config.num_labels if model == "vit" else config.vocab_size) == 96
    assert not any(m.p for m in base.modules() if isinstance(m, torch.nn.Dropout))
