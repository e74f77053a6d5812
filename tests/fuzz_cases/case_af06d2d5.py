"""Seed 4, case 513: the passes raise RuntimeError: a and b must have same reduction dim, but got [0, 0] X [1, 3]."""

import torch
import torch.nn.functional as F
from torch import nn


def transposed_inside(x, W, A, B, s):  # x [b, K, T], as after a convolution
    x = x.transpose(1, 2)
    return x @ W + (x @ A) @ B * s


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.l0 = nn.Module()
        self.l0.W = nn.Parameter(torch.empty((0, 3), dtype=torch.float64), requires_grad=False)
        self.l0.A = nn.Parameter(torch.empty((0, 1), dtype=torch.float64), requires_grad=True)
        self.l0.B = nn.Parameter(torch.empty((1, 3), dtype=torch.float64), requires_grad=True)

    def forward(self, v0, v1):
        v2 = transposed_inside(v1, self.l0.W, self.l0.A, self.l0.B, 1.0)
        return (v2,)


def inputs():
    return (
        torch.empty((2, 0, 1), dtype=torch.float64).requires_grad_(True),
        torch.empty((1, 0, 3), dtype=torch.float64).requires_grad_(True),
    )


KIND = "exact"
OPTIONS = {"form": "weight", "numerics": "default", "rounding": "nearest", "keep": "recompute", "machine": "rtx3090"}
