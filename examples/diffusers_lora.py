"""LoRA on a diffusion model's transformer or UNet, by diffusers: compile it, train it, see what was rewritten.

    python examples/diffusers_lora.py [--steps 20]

The UNet is a small one with random weights; it learns to find the noise in four random images.
"""

import argparse

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig

import peft_fx

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
unet = UNet2DConditionModel(
    sample_size=16,
    in_channels=4,
    out_channels=4,
    layers_per_block=1,
    block_out_channels=(32, 64),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=32,
    norm_num_groups=8,
).to(device)
unet.requires_grad_(False)
unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))

compiled = torch.compile(unet, backend="peft_fx")

scheduler = DDPMScheduler()
optimizer = torch.optim.AdamW((p for p in unet.parameters() if p.requires_grad), lr=1e-3)
latents, prompts = torch.randn(4, 4, 16, 16, device=device), torch.randn(4, 8, 32, device=device)
for step in range(args.steps):
    noise = torch.randn_like(latents)
    times = torch.randint(0, len(scheduler), (4,), device=device)
    predicted = compiled(scheduler.add_noise(latents, noise, times), times, prompts).sample
    loss = torch.nn.functional.mse_loss(predicted, noise)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")

print(peft_fx.explain(compiled))
