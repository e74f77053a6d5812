"""Seed 1, case 62: compiled, gradient of l0.A: 12 of 12 differ, by up to 2.23e+03"""

import torch
import torch.nn.functional as F
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.l0 = nn.Module()
        self.l0.W = nn.Parameter(torch.empty((4, 3), dtype=torch.float64), requires_grad=False)
        self.l0.A = nn.Parameter(torch.empty((4, 3), dtype=torch.float64), requires_grad=True)
        self.l0.B = nn.Parameter(torch.empty((3, 3), dtype=torch.float64), requires_grad=True)
        self.l0.V = nn.Parameter(torch.empty((4, 3), dtype=torch.float64), requires_grad=False)
        self.l0.C = nn.Parameter(torch.empty((4, 3), dtype=torch.float64), requires_grad=True)
        self.l0.D = nn.Parameter(torch.empty((3, 3), dtype=torch.float64), requires_grad=True)

    def forward(self, v0):
        v0.add_(v0, alpha=2.0)
        q = v0 @ self.l0.W + ((v0.to(torch.float64) @ self.l0.A) @ self.l0.B * -1.0).to(torch.float64)
        k = v0 @ self.l0.V + ((v0.to(torch.float64) @ self.l0.C) @ self.l0.D * -1.0).to(torch.float64)
        v1 = q * k
        return v1,


def inputs():
    return (torch.empty((2, 1, 4), dtype=torch.float64).requires_grad_(False),)


KIND = 'exact'
OPTIONS = {'form': 'activation', 'numerics': 'default', 'rounding': 'dithered', 'keep': 'recompute', 'machine': 'rtx4090', 'adapter_grad': 'dense'}
