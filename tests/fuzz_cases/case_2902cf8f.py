"""Seed 0, case 142: the passes raise IndexError: tuple index out of range"""

import torch
import torch.nn.functional as F
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.l0 = nn.Module()
        self.l0.W = nn.Parameter(torch.empty((8, 5), dtype=torch.float32), requires_grad=False)
        self.l0.A = nn.Parameter(torch.empty((8, 3), dtype=torch.float32), requires_grad=True)
        self.l0.B = nn.Parameter(torch.empty((3, 5), dtype=torch.float32), requires_grad=True)

    def forward(self, v0, v1):
        v2 = v1 @ self.l0.W + (v1 @ (self.l0.A * v1.sum())) @ self.l0.B * 2.0
        return v2,


def inputs():
    return (torch.empty((8, 3), dtype=torch.float32).requires_grad_(False), torch.empty((8, 1, 8), dtype=torch.float32).requires_grad_(False),)


KIND = 'mixed'
OPTIONS = {'form': 'auto', 'numerics': 'default', 'rounding': 'nearest', 'keep': 'recompute', 'machine': 'h100'}
