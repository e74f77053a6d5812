"""LoRA with transformers' Trainer: compile the model in place before Trainer gets it.

    python examples/trainer.py [--steps 20]

`TrainingArguments(torch_compile_backend=...)` takes names from accelerate's list alone, which peft_fx is not in; so
leave `torch_compile` off, and call `model.compile`. The model is a small Llama with random weights.
"""

import argparse
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import peft_fx

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4, use_cache=False
)
model = LlamaForCausalLM(config)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))

model = peft_fx.loss_only(model)  # Trainer reads the loss alone, so the logits need not exist
model.compile(backend="peft_fx")

texts = torch.randint(0, 512, (8, 256))
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=[{"input_ids": text, "labels": text} for text in texts]).train()

print(peft_fx.explain(model))
