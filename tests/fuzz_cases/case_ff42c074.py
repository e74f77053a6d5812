"""Seed 7, case 245: compiled, gradient of input 0: expected None, got torch.float64 [1, 4]"""

import torch
import torch.nn.functional as F
from torch import nn

def peft_casts(x, W, A, B, s):
    """PEFT with a bf16 base and fp32 adapters."""
    y = x @ W
    return (y + (x.to(A.dtype) @ A) @ B * s).to(y.dtype)



class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.l0 = nn.Module()
        self.l0.W = nn.Parameter(torch.empty((1, 8), dtype=torch.float64), requires_grad=False)
        self.l0.A = nn.Parameter(torch.empty((1, 1), dtype=torch.float64), requires_grad=False)
        self.l0.B = nn.Parameter(torch.empty((1, 8), dtype=torch.float64), requires_grad=True)

    def forward(self, v0, v1):
        v2 = peft_casts(v1, self.l0.W, self.l0.A, self.l0.B, -1.0)
        v0[..., :2].mul_(2.0)
        return v2,


def inputs():
    return (torch.empty((1, 4), dtype=torch.float64).requires_grad_(True), torch.empty((1, 1, 1), dtype=torch.float64).requires_grad_(False),)


KIND = 'exact'
OPTIONS = {'form': 'weight', 'numerics': 'default', 'rounding': 'dithered', 'keep': 'recompute', 'machine': 'l40s', 'adapter_grad': 'low_rank'}
