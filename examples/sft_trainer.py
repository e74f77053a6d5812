"""Supervised fine-tuning with TRL's SFTTrainer: compile the layers of its model in place before it trains.

    python examples/sft_trainer.py [--steps 20]

The model is a small Llama with random weights, the tokenizer knows the words of four sentences.
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import peft_fx

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

texts = [
    "an adapter is a change of a weight",
    "a merge costs the same for any batch",
    "what backward keeps is what memory costs",
    "a graph is read once and written once",
]
words = ["<pad>", "<eos>", *sorted({word for text in texts for word in text.split()})]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4, use_cache=False
)
with tempfile.TemporaryDirectory() as folder:
    trainer = SFTTrainer(
        LlamaForCausalLM(config),
        SFTConfig(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=4,
            gradient_checkpointing=False,  # TRL's default is True; adapters keep nothing in any case
            max_length=128,
            packing=True,  # several texts in one row: batches of one size, nothing compiled twice
            packing_strategy="wrapped",
            pad_to_multiple_of=128,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            bf16=torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"text": texts * 64}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    # the layers, not the head: TRL computes the loss with kernels of its own, which Dynamo does not trace
    trainer.model.get_base_model().base_model.compile(backend="peft_fx")
    trainer.train()

print(peft_fx.explain(trainer.model))
