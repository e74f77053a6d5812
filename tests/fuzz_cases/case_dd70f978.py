"""Seed 0, case 37: the passes raise IndexError: tuple index out of range"""

import torch
import torch.nn.functional as F
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.l0 = nn.Module()
        self.l0.W = nn.Parameter(torch.empty((4, 1), dtype=torch.float64), requires_grad=False)
        self.l0.A = nn.Parameter(torch.empty((4, 1), dtype=torch.float64), requires_grad=True)
        self.l0.B = nn.Parameter(torch.empty((1, 1), dtype=torch.float64), requires_grad=True)

    def forward(self, v0):
        v1 = v0 @ self.l0.W + (v0 @ (self.l0.A * v0.sum())) @ self.l0.B * -1.0
        return v1,


def inputs():
    return (torch.empty((8, 4), dtype=torch.float64).requires_grad_(False),)


KIND = 'exact'
OPTIONS = {'form': 'auto', 'numerics': 'default', 'rounding': 'nearest', 'keep': 'recompute', 'machine': 'l40s'}
