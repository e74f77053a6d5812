"""LoRA on several GPUs, or processes on a CPU, with FSDP2: compile each block, then shard it.

    torchrun --nproc-per-node 2 examples/fsdp2.py [--steps 20]

A merged weight is made of a block's gathered weights, in forward and again in backward, and lives no longer than they
do. All ranks decide alike. The model is a small Llama with random weights.
"""

import argparse
import os

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import peft_fx

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

on_gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
if on_gpu:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if on_gpu else "gloo")
rank = dist.get_rank()

torch.manual_seed(0)  # the same weights everywhere
config = LlamaConfig(
    vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4, use_cache=False
)
model = LlamaForCausalLM(config).to(device)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))

for block in model.get_base_model().model.layers:
    block.compile(backend="peft_fx")
    fully_shard(block, reshard_after_forward=True)
fully_shard(model)

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
ids = torch.randint(0, 512, (4, 256), generator=torch.Generator().manual_seed(rank)).to(device)  # each rank its own
for step in range(args.steps):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(mean := loss.detach() / dist.get_world_size())
    if rank == 0:
        print(f"step {step}: loss {mean.item():.4f}")

if rank == 0:
    print(peft_fx.explain(model))
dist.destroy_process_group()
