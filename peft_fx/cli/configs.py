"""A model from nothing but its configuration: transformers' architecture with PEFT's LoRA, on the meta device.

No weight is made, nothing is downloaded and no code but transformers' own runs.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from peft_fx.budgeting import parse_budget
from peft_fx.cli.terminal import Problem, require
from peft_fx.options import PREFIX, parse
from peft_fx.retargeting import DEVICES

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TARGETS = ("all-linear", "attention")
CAUSAL = "peft_fx_causal"  # attention without a mask
# in this order: what a configuration that names no architecture of transformers' is taken for
AUTO = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel")


def adapted_model(
    config: str | Path,
    rank: int = 16,
    targets: str = "all-linear",
    dropout: float = 0.0,
    dtype: str | None = None,
    dora: bool = False,
) -> Any:
    """The model of a configuration, base frozen, with LoRA on its layers, in training mode, on the meta device.

    `config` is a transformers config file or a folder with a config.json in it; `targets` is "all-linear", "attention"
    (the linear layers of attention alone) or names of layers with commas between; `dtype` that of the base, by default
    the configuration's own, and bfloat16 where it has none. Adapters are float32, as PEFT makes them. Raises a Problem
    that says what to do.
    """
    from peft import LoraConfig, get_peft_model

    import peft_fx

    base = base_model(config, dtype)
    chosen = _layers_of(base, targets)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=chosen, use_dora=dora)
    with torch.device("meta"), _quiet():
        try:
            model = get_peft_model(base, lora)
        except ValueError as error:  # no such layers
            some = sorted({name.rpartition(".")[2] for name in _linear(base)})
            raise Problem(f"PEFT found no layer for --targets {targets}. There are: {', '.join(some)}") from error
    return peft_fx.prepare(model.train())


def base_model(config: str | Path, dtype: str | None = None) -> Any:
    """The model of a configuration, frozen, in training mode, on the meta device."""
    read = read_config(config)
    wanted = DTYPES[dtype] if dtype else getattr(read, "dtype", None) or torch.bfloat16
    with torch.device("meta"), _quiet():
        model = _architecture(read, Path(config), wanted)
    model.config.use_cache = False
    return model.train().requires_grad_(False)


def read_config(path: str | Path) -> Any:
    """The transformers configuration in a file, or in a folder's config.json."""
    require("A model from its configuration", "transformers", "peft")
    from transformers import AutoConfig

    given = Path(path)
    file = given / "config.json" if given.is_dir() else given
    if not file.is_file():
        raise Problem(
            f"There is no file {file}. Give the config.json of a transformers model, or the folder that holds it: of a "
            "model on the Hub, the file of that name under 'Files', and nothing else, is needed."
        )
    try:
        return AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise Problem(f"transformers cannot read {file}: {_first_line(error)}") from error


def _architecture(config: Any, path: Path, dtype: torch.dtype) -> Any:
    """The class that the configuration names, or the first of `AUTO` that knows it."""
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found._from_config(config, dtype=dtype)
    for name in AUTO:
        auto = getattr(transformers, name)
        if type(config) in auto._model_mapping:
            return auto.from_config(config, dtype=dtype, trust_remote_code=False)
    raise Problem(f"transformers has no language model for {path}, of the type {config.model_type!r}")


def _layers_of(model: Any, targets: str) -> str | list[str]:
    if targets == "all-linear":
        return targets
    if targets != "attention":
        return [name.strip() for name in targets.split(",") if name.strip()]
    inside = [name for name, module in model.named_modules() if "Attention" in type(module).__name__]
    found = [name for name in _linear(model) if any(name.startswith(f"{a}.") for a in inside)]
    if not found:
        raise Problem("No module of this model calls itself attention: name its layers, as in --targets q_proj,v_proj")
    return found


def _linear(model: Any) -> Iterator[str]:
    """The names of linear layers, as transformers writes them."""
    return (name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D")


def batch_of(model: Any, tokens: int, batch: int = 1) -> dict[str, torch.Tensor]:
    """What a step of a model over token ids is called with, on the meta device: ids [batch, tokens], and labels."""
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise Problem(
            f"This model reads {model.main_input_name}, not token ids. From Python, with inputs of its own:\n\n"
            "    print(peft_fx.explain(model, **batch))"
        )
    ids = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if inner.config.is_encoder_decoder and getattr(inner.config, "decoder_start_token_id", None) is None:
        raise Problem(
            "This model's decoder reads its labels behind a first token, which the configuration does not name. Add a "
            'line to it, such as "decoder_start_token_id": 0 for T5.'
        )
    if hasattr(inner, "num_labels") and "Classification" in type(inner).__name__:
        per_token = "Token" in type(inner).__name__
        return {"input_ids": ids, "labels": ids if per_token else ids[:, 0]}
    return {"input_ids": ids, "labels": ids}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without third parties' warnings about what is theirs to choose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# ----------------------------------------------------------------------------------------------------- command line


def without_mask(model: Any) -> Any:
    """The model with attention that is causal by itself. Compiled, transformers' own would make a mask of T×T."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(CAUSAL, sdpa_attention_forward)
    if getattr(model.config, "_attn_implementation", None) == "sdpa" and not getattr(
        model.config, "is_encoder_decoder", False
    ):
        model.config._attn_implementation = CAUSAL
    return model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `adapted_model` and `batch_of` need, but for the tokens."""
    parser.add_argument("config", metavar="CONFIG", help="a transformers config.json, or a folder that holds one")
    parser.add_argument("--rank", type=positive, default=16, metavar="r", help="of LoRA (default: %(default)s)")
    targets = f"{', '.join(TARGETS)}, or layers by name, as in q_proj,v_proj (default: %(default)s)"
    parser.add_argument("--targets", default="all-linear", help=targets)
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="sequences (default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="of LoRA (default: %(default)g)")
    parser.add_argument("--dora", action="store_true", help="DoRA instead of LoRA")
    parser.add_argument("--dtype", choices=DTYPES, help="of the base (default: as the configuration says)")


def add_backend_arguments(parser: argparse.ArgumentParser, speeds: str) -> None:
    """Declares what `options_of` reads, and `device`; `speeds` says what the machine's are for."""
    machine = f"{speeds}: h100, a100, cpu, … or a calibration's file (default: this machine's)"
    parser.add_argument("--machine", help=machine)
    device = "whose graph is told of (default: the machine's)"
    parser.add_argument("--device", choices=DEVICES, help=device)
    option = "of the backend, as often as need be: form=weight, numerics=strict, keep=int8, …"
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help=option)


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """--option and --machine as torch.compile takes them; a Problem where the backend would not."""
    options = {}
    for given in args.option:
        key, equals, text = given.partition("=")
        if not equals:
            raise Problem(f"--option {given}: it must be KEY=VALUE, as in --option form=weight")
        try:
            options[PREFIX + key.removeprefix(PREFIX)] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[PREFIX + key.removeprefix(PREFIX)] = text
    if args.machine:
        options[f"{PREFIX}machine"] = args.machine
    try:
        parse(options)
    except ValueError as error:
        raise Problem(str(error)) from error
    return options


def model_of(args: argparse.Namespace) -> Any:
    """The model that the arguments of `add_arguments` describe."""
    return adapted_model(args.config, args.rank, args.targets, args.dropout, args.dtype, args.dora)


def budget(text: str) -> int:
    """Bytes, as 24GB, as an argument's type: what a part of a device's memory is of is not known to every command."""
    found: int | float | str = text
    with contextlib.suppress(ValueError):
        found = parse_budget(text)
    if not isinstance(found, int):
        raise argparse.ArgumentTypeError(f"must be bytes, as 9MB or 24GB, not {text!r}")
    return found


def positive(text: str) -> int:
    """A whole number above 0, as an argument's type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(text)
