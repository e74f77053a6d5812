"""Seed 0, case 90: the passes raise KeyError: add_6"""

import torch
import torch.nn.functional as F
from torch import nn

def alpha(x, W, A, B, s):
    return torch.add(x @ W, (x @ A) @ B, alpha=s)


def einsum(x, W, A, B, s):
    down = torch.einsum("...k,kr->...r", x, A)
    return torch.einsum("...k,kn->...n", x, W) + s * torch.einsum("...r,rn->...n", down, B)



class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.l1 = nn.Module()
        self.l2 = nn.Module()
        self.l1.W = nn.Parameter(torch.empty((2, 10), dtype=torch.float64), requires_grad=False)
        self.l1.A0 = nn.Parameter(torch.empty((2, 2), dtype=torch.float64), requires_grad=True)
        self.l1.B0 = nn.Parameter(torch.empty((2, 5), dtype=torch.float64), requires_grad=True)
        self.l1.A1 = nn.Parameter(torch.empty((2, 2), dtype=torch.float64), requires_grad=True)
        self.l1.B1 = nn.Parameter(torch.empty((2, 5), dtype=torch.float64), requires_grad=False)
        self.l2.W = nn.Parameter(torch.empty((5, 5), dtype=torch.float64), requires_grad=False)
        self.l2.A = nn.Parameter(torch.empty((5, 2), dtype=torch.float64), requires_grad=True)
        self.l2.B = nn.Parameter(torch.empty((2, 5), dtype=torch.float64), requires_grad=True)

    def forward(self, v0):
        h = v0 @ self.l1.W
        p0 = h[..., 0:5]
        p1 = h[..., 5:10]
        p0 = p0 + ((v0.to(torch.float64) @ self.l1.A0) @ self.l1.B0 * -1.0).to(torch.float64)
        p1 = p1 + ((v0.to(torch.float64) @ self.l1.A1) @ self.l1.B1 * -1.0).to(torch.float64)
        v4 = p0 + p1
        v5 = alpha(v4, self.l2.W, self.l2.A, self.l2.B, 1.0)
        return v5,


class Other(Model):
    def forward(self, v0):
        h = v0 @ self.l1.W
        p0 = h[..., 0:5]
        p1 = h[..., 5:10]
        p0 = p0 + ((v0.to(torch.float64) @ self.l1.A0) @ self.l1.B0 * -1.0).to(torch.float64)
        p1 = p1 + ((v0.to(torch.float64) @ self.l1.A1) @ self.l1.B1 * -1.0).to(torch.float64)
        v4 = p0 + p1
        v5 = einsum(v4, self.l2.W, self.l2.A, self.l2.B, 1.0)
        return v5,


def inputs():
    return (torch.empty((1, 5, 2), dtype=torch.float64).requires_grad_(True),)


KIND = 'exact'
OPTIONS = {'form': 'activation', 'numerics': 'default', 'rounding': 'nearest', 'keep': 'recompute', 'machine': 't4', 'adapter_grad': 'dense'}
