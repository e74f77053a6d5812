"""Seed 301, case 1078: in other words the report differs: ([('l0.W', 'weight')], [('l1.W', 'unknown_op')]) and ([('l0.W', 'weight'), ('l1.W', 'weight')], [])"""

import torch
import torch.nn.functional as F
from torch import nn

def merged_factors(x, W, A, B, s):
    return x @ W + x @ (A @ B) * s


def scale_by_division(x, W, A, B, s):
    return x @ W + (x @ A) @ B / (1 / s)



class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.l0 = nn.Module()
        self.l1 = nn.Module()
        self.l0.W = nn.Parameter(torch.empty((5, 5), dtype=torch.float32), requires_grad=True)
        self.l0.A = nn.Parameter(torch.empty((5, 2), dtype=torch.float32), requires_grad=True)
        self.l0.B = nn.Parameter(torch.empty((2, 5), dtype=torch.float32), requires_grad=False)
        self.l1.W = nn.Parameter(torch.empty((5, 15), dtype=torch.float32), requires_grad=False)
        self.l1.A0 = nn.Parameter(torch.empty((5, 2), dtype=torch.float32), requires_grad=True)
        self.l1.B0 = nn.Parameter(torch.empty((2, 5), dtype=torch.float32), requires_grad=True)
        self.l1.A2 = nn.Parameter(torch.empty((5, 2), dtype=torch.float32), requires_grad=True)
        self.l1.B2 = nn.Parameter(torch.empty((2, 5), dtype=torch.float32), requires_grad=True)

    def forward(self, v0):
        v1 = merged_factors(v0, self.l0.W, self.l0.A, self.l0.B, 2.0)
        h = v1 @ self.l1.W
        p0, p1, p2 = h.chunk(3, -1)
        p0 = p0 + ((v1.to(torch.float32) @ self.l1.A0) @ self.l1.B0 * 1.0).to(torch.float32)
        p2 = p2 + ((v1.to(torch.float32) @ self.l1.A2) @ self.l1.B2 * 0.5).to(torch.float32)
        v2 = p0 - p1 - p2
        return v2,


class Other(Model):
    def forward(self, v0):
        v1 = scale_by_division(v0, self.l0.W, self.l0.A, self.l0.B, 2.0)
        h = v1 @ self.l1.W
        p0, p1, p2 = h.chunk(3, -1)
        p0 = p0 + ((v1.to(torch.float32) @ self.l1.A0) @ self.l1.B0 * 1.0).to(torch.float32)
        p2 = p2 + ((v1.to(torch.float32) @ self.l1.A2) @ self.l1.B2 * 0.5).to(torch.float32)
        v2 = p0 - p1 - p2
        return v2,


def inputs():
    return (torch.empty((4, 1, 5), dtype=torch.float32).requires_grad_(True),)


KIND = 'real'
OPTIONS = {'form': 'weight', 'numerics': 'default', 'rounding': 'nearest', 'keep': 'inductor', 'machine': 'rtx3090', 'adapter_grad': 'dense'}
