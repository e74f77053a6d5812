"""Seed 0, case 489: the passes raise RuntimeError: a and b must have same reduction dim, but got [0, 0] X [1, 2]."""

import torch
import torch.nn.functional as F
from torch import nn

def peft_casts(x, W, A, B, s):
    """PEFT with a bf16 base and fp32 adapters."""
    y = x @ W
    return (y + (x.to(A.dtype) @ A) @ B * s).to(y.dtype)


def transposed_inside(x, W, A, B, s):  # x [b, K, T], as after a convolution
    x = x.transpose(1, 2)
    return x @ W + (x @ A) @ B * s



class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.l0 = nn.Module()
        self.l1 = nn.Module()
        self.l0.W = nn.Parameter(torch.empty((2, 3), dtype=torch.float64), requires_grad=False)
        self.l0.A = nn.Parameter(torch.empty((2, 1), dtype=torch.float64), requires_grad=False)
        self.l0.B = nn.Parameter(torch.empty((1, 3), dtype=torch.float64), requires_grad=True)
        self.l1.W = nn.Parameter(torch.empty((0, 2), dtype=torch.float64), requires_grad=False)
        self.l1.A = nn.Parameter(torch.empty((0, 1), dtype=torch.float64), requires_grad=False)
        self.l1.B = nn.Parameter(torch.empty((1, 2), dtype=torch.float64), requires_grad=True)

    def forward(self, v0):
        v1 = v0.clone()
        v1[..., :1].mul_(1.0)
        v2 = peft_casts(v1, self.l0.W, self.l0.A, self.l0.B, 0.5)
        v3 = transposed_inside(v2, self.l1.W, self.l1.A, self.l1.B, 1.0)
        return v3,


def inputs():
    return (torch.empty((2, 0, 2), dtype=torch.float64).requires_grad_(False),)


KIND = 'exact'
OPTIONS = {'form': 'weight', 'numerics': 'default', 'rounding': 'nearest', 'keep': 'recompute', 'machine': 't4', 'adapter_grad': 'auto'}
