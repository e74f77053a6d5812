"""LoRA on a diffusion model of diffusers: compile its transformer, train it, see what was rewritten.

    python examples/diffusers_lora.py [--steps 20]

The transformer is Stable Diffusion 3's, small and with random weights; four random images are learnt by flow matching.
"""

import argparse

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig

import peft_fx

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = SD3Transformer2DModel(
    sample_size=32,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    num_attention_heads=4,
    attention_head_dim=16,
    joint_attention_dim=64,
    caption_projection_dim=64,
    pooled_projection_dim=32,
    pos_embed_max_size=16,
).to(device)
model.requires_grad_(False)
model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))

compiled = torch.compile(model, backend="peft_fx")

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
images, prompts, pooled = (torch.randn(*sizes, device=device) for sizes in ((4, 4, 32, 32), (4, 16, 64), (4, 32)))
for step in range(args.steps):
    noise, t = torch.randn_like(images), torch.rand(4, device=device)
    between = torch.lerp(images, noise, t.view(4, 1, 1, 1))
    velocity = compiled(between, prompts, pooled, t * 1000).sample
    loss = torch.nn.functional.mse_loss(velocity, noise - images)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")

print(peft_fx.explain(compiled))
