"""Seed 601, case 766: the passes raise AttributeError: 'Node' object has no attribute 'of'"""

import torch
import torch.nn.functional as F
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.l1 = nn.Module()
        self.l1.register_buffer('n', torch.empty((4, 5), dtype=torch.float64))
        self.l1.A = nn.Parameter(torch.empty((4, 1), dtype=torch.float64), requires_grad=True)
        self.l1.B = nn.Parameter(torch.empty((1, 5), dtype=torch.float64), requires_grad=True)

    def forward(self, v0):
        v1 = 1 - v0
        v2 = torch.sub(v1, v1, alpha=-1.0)
        with torch.no_grad(): self.l1.n.neg_()
        v4 = v2 @ (torch.ones_like(self.l1.n) * self.l1.n) + (v2 @ self.l1.A) @ self.l1.B * 1.0
        with torch.no_grad(): self.l1.n.index_add_(0, torch.tensor([0]), self.l1.n[:1] * 1)
        v4 = v4 + v2 @ (self.l1.n.double().to(torch.float64)) + (v2 @ self.l1.A) @ self.l1.B * 1.0
        with torch.no_grad(): self.l1.n.sub_(self.l1.n * 2)
        return v4,


def inputs():
    return (torch.empty((3, 4), dtype=torch.float64).requires_grad_(False),)


KIND = 'exact'
OPTIONS = {'form': 'auto', 'numerics': 'default', 'rounding': 'nearest', 'keep': 'recompute', 'machine': 'h200', 'adapter_grad': 'low_rank'}
