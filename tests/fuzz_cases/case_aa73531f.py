"""Seed 4, case 1141: the passes raise KeyError: neg"""

import torch
import torch.nn.functional as F
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.l0 = nn.Module()
        self.l1 = nn.Module()
        self.l2 = nn.Module()
        self.l0.W = nn.Parameter(torch.empty((3, 3), dtype=torch.float64), requires_grad=False)
        self.l1.W = nn.Parameter(torch.empty((3, 12), dtype=torch.float64), requires_grad=False)
        self.l1.b = nn.Parameter(torch.empty((12,), dtype=torch.float64), requires_grad=False)
        self.l1.A0 = nn.Parameter(torch.empty((3, 2), dtype=torch.float64), requires_grad=True)
        self.l1.B0 = nn.Parameter(torch.empty((2, 4), dtype=torch.float64), requires_grad=True)
        self.l1.A2 = nn.Parameter(torch.empty((3, 2), dtype=torch.float64), requires_grad=False)
        self.l1.B2 = nn.Parameter(torch.empty((2, 4), dtype=torch.float64), requires_grad=True)
        self.l2.W = nn.Parameter(torch.empty((4, 8), dtype=torch.float64), requires_grad=False)
        self.l2.b = nn.Parameter(torch.empty((8,), dtype=torch.float64), requires_grad=False)
        self.l2.A0 = nn.Parameter(torch.empty((4, 2), dtype=torch.float64), requires_grad=True)
        self.l2.B0 = nn.Parameter(torch.empty((2, 4), dtype=torch.float64), requires_grad=False)

    def forward(self, v0, v1):
        v2 = v1 @ self.l0.W
        h = v2 @ self.l1.W + self.l1.b
        p0, p1, p2 = h.chunk(3, -1)
        p0 = p0 + ((v2.to(torch.float64) @ self.l1.A0) @ self.l1.B0 * 2.0).to(torch.float64)
        p2 = p2 + ((v2.to(torch.float64) @ self.l1.A2) @ self.l1.B2 * 0.5).to(torch.float64)
        v3 = p0 - p1 - p2
        h = v3 @ self.l2.W + self.l2.b
        h[..., 0:4] += ((v3.to(torch.float64) @ self.l2.A0) @ self.l2.B0 * 1.0).to(torch.float64)
        p0 = h[..., 0:4]
        p1 = h[..., 4:8]
        v4 = (torch.cat([p0, p1], -1) * 2)[..., :4]
        return v4,


class Other(Model):
    def forward(self, v0, v1):
        v2 = v1 @ self.l0.W
        h = v2 @ self.l1.W + self.l1.b
        p0, p1, p2 = h.chunk(3, -1)
        p0 = p0 + ((v2.to(torch.float64) @ self.l1.A0) @ self.l1.B0 * 2.0).to(torch.float64)
        p2 = p2 + ((v2.to(torch.float64) @ self.l1.A2) @ self.l1.B2 * 0.5).to(torch.float64)
        v3 = p0 - p1 - p2
        h = v3 @ self.l2.W + self.l2.b
        p0, p1 = h.chunk(2, -1)
        p0 = p0 + ((v3.to(torch.float64) @ self.l2.A0) @ self.l2.B0 * 1.0).to(torch.float64)
        v4 = (torch.cat([p0, p1], -1) * 2)[..., :4]
        return v4,


def inputs():
    return (torch.empty((8, 5), dtype=torch.float64).requires_grad_(True), torch.empty((1, 8, 3), dtype=torch.float64).requires_grad_(True),)


KIND = 'exact'
OPTIONS = {'form': 'weight', 'numerics': 'default', 'rounding': 'nearest', 'keep': 'recompute', 'machine': 'a100', 'adapter_grad': 'auto'}
