"""Seed 4, case 1010: result 4 is (torch.float64, torch.Size([1, 5, 3]), [1, 5]), was (torch.float64, torch.Size([1, 5, 3]), [3, 1])"""

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
        self.l0.W = nn.Parameter(torch.empty((5, 3), dtype=torch.float64), requires_grad=False)
        self.l0.A = nn.Parameter(torch.empty((5, 3), dtype=torch.float64), requires_grad=True)
        self.l0.B = nn.Parameter(torch.empty((3, 3), dtype=torch.float64), requires_grad=True)

    def forward(self, v0):
        v1 = transposed_inside(v0, self.l0.W, self.l0.A, self.l0.B, 0.5)
        return (v1,)


def inputs():
    return (torch.empty((1, 5, 3), dtype=torch.float64).requires_grad_(True),)


KIND = "exact"
OPTIONS = {"form": "weight", "numerics": "strict", "rounding": "nearest", "keep": "recompute", "machine": "h100"}
