"""Seed 501, case 264: the passes raise ValueError: range() arg 3 must not be zero"""

import torch
import torch.nn.functional as F
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.l0 = nn.Module()
        self.l0.W = nn.Parameter(torch.empty((1, 5), dtype=torch.bfloat16), requires_grad=False)
        self.l0.A = nn.Parameter(torch.empty((1, 2), dtype=torch.float32), requires_grad=True)
        self.l0.B = nn.Parameter(torch.empty((2, 5), dtype=torch.float32), requires_grad=True)

    def forward(self, v0):
        v1 = (v0.to(torch.bfloat16) @ self.l0.W + v0.to(torch.bfloat16).float() @ self.l0.A @ self.l0.B * 0.5).to(torch.float32)
        return v1,


def inputs():
    return (torch.empty((0, 1), dtype=torch.float32).requires_grad_(True),)


KIND = 'mixed'
OPTIONS = {'form': 'weight', 'numerics': 'default', 'rounding': 'nearest', 'keep': 'recompute', 'machine': 'avx2', 'adapter_grad': 'dense'}
