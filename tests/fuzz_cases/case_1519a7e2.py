"""Seed 3, case 566: the passes raise KeyError: add_1"""

import torch
import torch.nn.functional as F
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.l0 = nn.Module()
        self.l0.W = nn.Parameter(torch.empty((3, 8), dtype=torch.float32), requires_grad=False)
        self.l0.A0 = nn.Parameter(torch.empty((3, 2), dtype=torch.float32), requires_grad=True)
        self.l0.B0 = nn.Parameter(torch.empty((2, 4), dtype=torch.float32), requires_grad=True)

    def forward(self, v0, v1):
        h = v0 @ self.l0.W
        h[..., 0:4] += ((v0.to(torch.float32) @ self.l0.A0) @ self.l0.B0 * 2.0).to(torch.float32)
        p0 = h[..., 0:4]
        p1 = h[..., 4:8]
        v2 = p0 * p1
        return v2,


class Other(Model):
    def forward(self, v0, v1):
        h = v0 @ self.l0.W
        p0 = h[..., 0:4]
        p1 = h[..., 4:8]
        p0 = p0 + ((v0.to(torch.float32) @ self.l0.A0) @ self.l0.B0 * 2.0).to(torch.float32)
        v2 = p0 * p1
        return v2,


def inputs():
    return (torch.empty((3, 3), dtype=torch.float32).requires_grad_(True), torch.empty((3, 3), dtype=torch.float32).requires_grad_(False),)


KIND = 'real'
OPTIONS = {'form': 'activation', 'numerics': 'default', 'rounding': 'nearest', 'keep': 'recompute', 'machine': 'h100', 'adapter_grad': 'auto'}
