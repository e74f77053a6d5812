"""Seed 4, case 759: the passes raise KeyError: add_tensor_2"""

import torch
import torch.nn.functional as F
from torch import nn


def flat_hidden(x, W, A, B, s):
    down = (x.reshape(-1, x.shape[-1]) @ A).view(*x.shape[:-1], A.shape[-1])
    return x @ W + down @ B * s


def scale_outer(x, W, A, B, s):
    return s * (x @ (W / s) + (x @ A) @ B)


def scale_right(x, W, A, B, s):
    return x @ W + (x @ A) @ B * s


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.l0 = nn.Module()
        self.l1 = nn.Module()
        self.l2 = nn.Module()
        self.l0.W = nn.Parameter(torch.empty((3, 2), dtype=torch.float32), requires_grad=True)
        self.l0.A = nn.Parameter(torch.empty((3, 3), dtype=torch.float32), requires_grad=True)
        self.l0.B = nn.Parameter(torch.empty((3, 2), dtype=torch.float32), requires_grad=True)
        self.l1.W = nn.Parameter(torch.empty((2, 5), dtype=torch.float32), requires_grad=False)
        self.l1.A = nn.Parameter(torch.empty((2, 3), dtype=torch.float32), requires_grad=True)
        self.l1.B = nn.Parameter(torch.empty((3, 5), dtype=torch.float32), requires_grad=True)
        self.l2.W = nn.Parameter(torch.empty((5, 5), dtype=torch.float32), requires_grad=False)
        self.l2.A = nn.Parameter(torch.empty((5, 1), dtype=torch.float32), requires_grad=False)
        self.l2.B = nn.Parameter(torch.empty((1, 5), dtype=torch.float32), requires_grad=True)

    def forward(self, v0):
        v1 = flat_hidden(v0, self.l0.W, self.l0.A, self.l0.B, 1.0)
        v2 = scale_outer(v1, self.l1.W, self.l1.A, self.l1.B, 0.5)
        v4 = scale_right(v2, self.l2.W, self.l2.A, self.l2.B, 2.0)
        v5 = torch.sub(v2, v4, alpha=1.0)
        return (v5,)


def inputs():
    return (torch.empty((4, 1, 3), dtype=torch.float32).requires_grad_(True),)


KIND = "real"
OPTIONS = {"form": "weight", "numerics": "default", "rounding": "nearest", "keep": "recompute", "machine": "l40s"}
