"""Seed 301, case 499: in other words the report differs: ([('l0.W', 'weight')], []) and ([('l0.W', 'weight')], [('l1.A', 'different_input')])"""

import torch
import torch.nn.functional as F
from torch import nn

def in_place(x, W, A, B, s):
    y = x @ W
    y += (x @ A) @ B * s
    return y


def linear(x, W, A, B, s):
    return F.linear(x, W.t()) + F.linear(F.linear(x, A.t()), B.t()) * s


def merged_factors(x, W, A, B, s):
    return x @ W + x @ (A @ B) * s



class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.l0 = nn.Module()
        self.l1 = nn.Module()
        self.l0.W = nn.Parameter(torch.empty((8, 3), dtype=torch.float64), requires_grad=False)
        self.l0.A = nn.Parameter(torch.empty((8, 1), dtype=torch.float64), requires_grad=True)
        self.l0.B = nn.Parameter(torch.empty((1, 3), dtype=torch.float64), requires_grad=True)
        self.l1.W = nn.Parameter(torch.empty((3, 4), dtype=torch.float64), requires_grad=True)
        self.l1.A = nn.Parameter(torch.empty((3, 2), dtype=torch.float64), requires_grad=True)
        self.l1.B = nn.Parameter(torch.empty((2, 4), dtype=torch.float64), requires_grad=True)

    def forward(self, v0, v1):
        v4 = in_place(v1, self.l0.W, self.l0.A, self.l0.B, -1.0)
        v5 = merged_factors(v4, self.l1.W, self.l1.A, self.l1.B, -1.0)
        return v5,


class Other(Model):
    def forward(self, v0, v1):
        v4 = in_place(v1, self.l0.W, self.l0.A, self.l0.B, -1.0)
        v5 = linear(v4, self.l1.W, self.l1.A, self.l1.B, -1.0)
        return v5,


def inputs():
    return (torch.empty((5, 1, 2), dtype=torch.float64).requires_grad_(True), torch.empty((5, 1, 8), dtype=torch.float64).requires_grad_(True),)


KIND = 'exact'
OPTIONS = {'form': 'weight', 'numerics': 'default', 'rounding': 'dithered', 'keep': 'recompute', 'machine': 'h100', 'adapter_grad': 'auto'}
