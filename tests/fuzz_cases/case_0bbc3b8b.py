"""Seed 0, case 1628: the passes raise IndexError: list index out of range"""

import torch
import torch.nn.functional as F
from torch import nn

def low_rank(x, A, B):
    return x @ A @ B


def part_scaled(x, d):
    return torch.cat([x[..., : d.shape[0]], x[..., d.shape[0] :] * d], -1)


def reflection(x, v):
    return x - (x @ v) * v[:, 0]


def rows(x, *sizes):
    """The features of x in these sizes."""
    return x.reshape(*x.shape[:-1], *sizes)


def turned(x, c, s):
    pairs = rows(x, -1, 2)
    return x * c + torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2) * s



class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.l0 = nn.Module()
        self.l1 = nn.Module()
        self.l0.W = nn.Parameter(torch.empty((1, 2), dtype=torch.float64), requires_grad=False)
        self.l0.d = nn.Parameter(torch.empty((1,), dtype=torch.float64), requires_grad=True)
        self.l0.e = nn.Parameter(torch.empty((2,), dtype=torch.float64), requires_grad=False)
        self.l0.f = nn.Parameter(torch.empty((2,), dtype=torch.float64), requires_grad=True)
        self.l0.g = nn.Parameter(torch.empty((1, 2), dtype=torch.float64), requires_grad=True)
        self.l0.h = nn.Parameter(torch.empty((2, 1), dtype=torch.float64), requires_grad=True)
        self.l0.i = nn.Parameter(torch.empty((1, 1), dtype=torch.float64), requires_grad=True)
        self.l0.B = nn.Parameter(torch.empty((1, 2), dtype=torch.float64), requires_grad=True)
        self.l1.W = nn.Parameter(torch.empty((2, 4), dtype=torch.float64), requires_grad=False)
        self.l1.A = nn.Parameter(torch.empty((2, 1), dtype=torch.float64), requires_grad=True)
        self.l1.B = nn.Parameter(torch.empty((1, 4), dtype=torch.float64), requires_grad=False)
        self.l1.register_buffer('n', torch.empty((2, 4), dtype=torch.float64))

    def forward(self, v0):
        v1 = turned(part_scaled((v0 @ self.l0.W), self.l0.d), self.l0.e, self.l0.f) + reflection(low_rank(v0, self.l0.g, self.l0.h), self.l0.i) @ self.l0.B
        with torch.no_grad(): self.l1.n.zero_()
        v2 = v1 @ (self.l1.n.mT.clone().mT) + (v1 @ self.l1.A) @ self.l1.B * 1.0
        with torch.no_grad(): self.l1.n.mul_(2)
        v2 = v2 + v1 @ (self.l1.n + 0) + (v1 @ self.l1.A) @ self.l1.B * 1.0
        with torch.no_grad(): self.l1.n.fill_(3)
        return v2,


def inputs():
    return (torch.empty((8, 1, 1), dtype=torch.float64).requires_grad_(True),)


KIND = 'exact'
OPTIONS = {'form': 'weight', 'numerics': 'default', 'rounding': 'nearest', 'keep': 'recompute', 'machine': 'h200', 'adapter_grad': 'auto'}
