"""Seed 301, case 1000: in other words the report differs: ([('l0.W', 'weight'), ('l2.A', 'none'), ('l2.B', 'weight')], []) and ([('l0.W', 'weight')], [])"""

import torch
import torch.nn.functional as F
from torch import nn

def halves(x, W, A, B, s):
    return (x @ W + (x @ A) @ B * (s / 2)) + (x @ A) @ B * (s / 2)


def linear(x, W, A, B, s):
    return F.linear(x, W.t()) + F.linear(F.linear(x, A.t()), B.t()) * s



class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.l0 = nn.Module()
        self.l2 = nn.Module()
        self.l0.W = nn.Parameter(torch.empty((4, 8), dtype=torch.float64), requires_grad=False)
        self.l0.b = nn.Parameter(torch.empty((8,), dtype=torch.float64), requires_grad=False)
        self.l0.A = nn.Parameter(torch.empty((4, 1), dtype=torch.float64), requires_grad=False)
        self.l0.B = nn.Parameter(torch.empty((1, 8), dtype=torch.float64), requires_grad=False)
        self.l0.c = nn.Parameter(torch.empty((8,), dtype=torch.float64), requires_grad=True)
        self.l2.W = nn.Parameter(torch.empty((8, 4), dtype=torch.float64), requires_grad=False)
        self.l2.A = nn.Parameter(torch.empty((8, 3), dtype=torch.float64), requires_grad=False)
        self.l2.B = nn.Parameter(torch.empty((3, 4), dtype=torch.float64), requires_grad=False)

    def forward(self, v0):
        v1 = F.linear(v0, self.l0.W.t(), self.l0.b) + F.linear(F.linear(v0, self.l0.A.t()), self.l0.B.t(), self.l0.c) * 2.0
        v3 = halves(v1, self.l2.W, self.l2.A, self.l2.B, 0.5)
        return v3,


class Other(Model):
    def forward(self, v0):
        v1 = F.linear(v0, self.l0.W.t(), self.l0.b) + F.linear(F.linear(v0, self.l0.A.t()), self.l0.B.t(), self.l0.c) * 2.0
        v3 = linear(v1, self.l2.W, self.l2.A, self.l2.B, 0.5)
        return v3,


def inputs():
    return (torch.empty((5, 4), dtype=torch.float64).requires_grad_(True),)


KIND = 'exact'
OPTIONS = {'form': 'activation', 'numerics': 'default', 'rounding': 'nearest', 'keep': 'recompute', 'machine': 'avx2', 'adapter_grad': 'auto'}
