"""Seed 11, case 1695: the passes raise KeyError: add_10"""

import torch
import torch.nn.functional as F
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.l0 = nn.Module()
        self.l1 = nn.Module()
        self.l2 = nn.Module()
        self.l0.W = nn.Parameter(torch.empty((1, 3), dtype=torch.float64), requires_grad=False)
        self.l0.A = nn.Parameter(torch.empty((1, 2), dtype=torch.float64), requires_grad=True)
        self.l0.B = nn.Parameter(torch.empty((2, 3), dtype=torch.float64), requires_grad=True)
        self.l1.W = nn.Parameter(torch.empty((3, 2), dtype=torch.float64), requires_grad=False)
        self.l1.b = nn.Parameter(torch.empty((2,), dtype=torch.float64), requires_grad=True)
        self.l1.A0 = nn.Parameter(torch.empty((3, 2), dtype=torch.float64), requires_grad=True)
        self.l1.B0 = nn.Parameter(torch.empty((2, 1), dtype=torch.float64), requires_grad=True)
        self.l2.W = nn.Parameter(torch.empty((1, 8), dtype=torch.float64), requires_grad=False)
        self.l2.A = nn.Parameter(torch.empty((1, 3), dtype=torch.float64), requires_grad=True)
        self.l2.B = nn.Parameter(torch.empty((3, 8), dtype=torch.float64), requires_grad=False)
        self.l2.V = nn.Parameter(torch.empty((1, 8), dtype=torch.float64), requires_grad=False)
        self.l2.D = nn.Parameter(torch.empty((3, 8), dtype=torch.float64), requires_grad=True)

    def forward(self, v0):
        h = v0 * 2
        v1 = h @ self.l0.W
        h.mul_(v0)
        v1 = v1 + (h @ self.l0.A) @ self.l0.B * 1.0
        h = v1 @ self.l1.W + self.l1.b
        p0 = h[..., 0:1]
        p1 = h[..., 1:2]
        p0 = p0 + ((v1.to(torch.float64) @ self.l1.A0) @ self.l1.B0 * 1.0).to(torch.float64)
        v2 = p0 + p1
        q = v2 @ self.l2.W + ((v2.to(torch.float64) @ self.l2.A) @ self.l2.B * -1.0).to(torch.float64)
        k = v2 @ self.l2.V + ((v2.to(torch.float64) @ self.l2.A) @ self.l2.D * -1.0).to(torch.float64)
        v3 = q * k
        return v3,


def inputs():
    return (torch.empty((3, 1), dtype=torch.float64).requires_grad_(True),)


KIND = 'exact'
OPTIONS = {'form': 'weight', 'numerics': 'default', 'rounding': 'nearest', 'keep': 'recompute', 'machine': 'cpu', 'adapter_grad': 'auto'}
