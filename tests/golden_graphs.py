"""What the passes make of known graphs, as text: `tests/goldens/` holds it, and a refactoring changes none of it.

Equal numbers do not tell two graphs apart. Where a change of a graph is meant, `python -m tests.golden_graphs` writes
the texts anew, and the commit says why they differ.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import peft
import torch
import transformers as tf
from torch import nn
from torch.fx import Node

import peft_fx
from peft_fx.listing import line
from tests.support import affine_spellings, joint, spellings
from tests.support.oracle import Inputs
from tests.support.peft_models import llama_config, mlp, tokens

FOLDER = pathlib.Path(__file__).parent / "goldens"
VERSION = "2.13.0"  # other versions of torch decompose and trace otherwise
WEIGHT = {"form": "weight"}
SAVING = {"keep": "int8", "form": "weight", "memory_weight": 1.0}


@dataclass(frozen=True)
class Golden:
    """A module and its arguments, and the options under which its graph is told."""

    name: str
    make: Callable[[], tuple[nn.Module, Inputs]]
    options: tuple[dict[str, Any], ...] = field(default=(WEIGHT,))

    @property
    def path(self) -> pathlib.Path:
        return FOLDER / f"{self.name}.txt"

    def text(self) -> str:
        """For each of the options, what was found, and the graph."""
        torch.manual_seed(0)
        module, inputs = self.make()
        given, named = (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)
        captured = joint.capture(module, *given, **named)
        return "\n".join(part for options in self.options for part in told(captured, options)) + "\n"


def told(captured: joint.Joint, options: dict[str, Any]) -> Iterator[str]:
    """The options, the outcome without its seconds, and each node of the graph, numbered in order."""
    graph, outcome = captured.rewritten(machine="cpu", **options)
    yield f"# {', '.join(f'{k}={v}' for k, v in options.items()) or 'default'}"
    for kind, found in asdict(outcome).items():
        if isinstance(found, list):
            yield from (f"{kind}: {_rounded(one)}" for one in found)
        elif kind not in ("seconds", "spare", "budget"):
            yield f"{kind}: {found}"
    names: dict[Node, str] = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        text = line(node, names) if node.op != "output" else f"output: {_listed(node.args[0], names)}"
        yield text.replace(f"{node.name}:", f"{names[node]}:", 1)
    yield ""


def _rounded(found: dict[str, Any]) -> dict[str, Any]:
    """Prices to three digits: the last ones are of the machine's arithmetic."""
    return {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in found.items()}


def _listed(results: Any, names: dict[Node, str]) -> str:
    return ", ".join(names[r] if isinstance(r, Node) else str(r) for r in results)


def case(one: spellings.Case) -> Callable[[], tuple[nn.Module, Inputs]]:
    return lambda: one.make(torch.float32)


def adapted(options: peft.PeftConfig, x: torch.Tensor) -> tuple[nn.Module, Inputs]:
    model = peft_fx.prepare(peft.get_peft_model(mlp().bfloat16(), options))
    return model, (x.bfloat16().requires_grad_(),)


def method(config: type[peft.PeftConfig], **named: Any) -> Callable[[], tuple[nn.Module, Inputs]]:
    """A PEFT method on the three layers of a small network, bfloat16 under float32 adapters, of 1024 tokens."""
    return lambda: adapted(config(target_modules=["0", "2", "4"], **named), torch.randn(1024, 64))


def llama(**named: Any) -> tuple[nn.Module, Inputs]:
    """A layer and its loss, whose logits nobody reads."""
    base = tf.LlamaForCausalLM(llama_config(64, 128, 1)).bfloat16()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", **named))
    ids = tokens(2, 512)
    return _Loss(model), {"input_ids": ids, "labels": ids}


class _Loss(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return self.model(**batch).loss


EVERY = ({}, WEIGHT, SAVING)
GOLDENS = [
    *(Golden(f"lora-{one.id}", case(one)) for one in spellings.SPELLINGS),
    *(Golden(f"affine-{one.id}", case(one)) for one in affine_spellings.SPELLINGS),
    Golden("peft-lora", method(peft.LoraConfig), EVERY),
    Golden("peft-lora-dropout", method(peft.LoraConfig, lora_dropout=0.1), EVERY),
    Golden("peft-dora", method(peft.LoraConfig, use_dora=True), EVERY),
    Golden("peft-ia3", method(peft.IA3Config, feedforward_modules=["2"]), EVERY),
    Golden("peft-vera", method(peft.VeraConfig, r=16), EVERY),
    Golden("peft-loha", method(peft.LoHaConfig), EVERY),
    Golden("peft-lokr", method(peft.LoKrConfig), EVERY),
    Golden("peft-oft", method(peft.OFTConfig, r=0, oft_block_size=16), EVERY),
    Golden("llama", llama, EVERY),
    Golden("llama-dropout", lambda: llama(lora_dropout=0.1), EVERY),
]


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.txt"):
        old.unlink()
    for golden in GOLDENS:
        torch._dynamo.reset()
        golden.path.write_text(golden.text())


if __name__ == "__main__":
    main()
