"""Seed 0, case 3387: in other words the report differs: ([('l0.W', 'weight'), ('l1.W', 'weight')], []) and ([('l0.W', 'weight')], [('l1.W', 'shared')])"""

import torch
import torch.nn.functional as F
from torch import nn

def einsum(x, W, A, B, s):
    down = torch.einsum("...k,kr->...r", x, A)
    return torch.einsum("...k,kn->...n", x, W) + s * torch.einsum("...r,rn->...n", down, B)



class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.l0 = nn.Module()
        self.l1 = nn.Module()
        self.l0.W = nn.Parameter(torch.empty((3, 8), dtype=torch.bfloat16), requires_grad=False)
        self.l0.A = nn.Parameter(torch.empty((3, 3), dtype=torch.bfloat16), requires_grad=True)
        self.l0.B = nn.Parameter(torch.empty((3, 8), dtype=torch.bfloat16), requires_grad=True)
        self.l1.W = nn.Parameter(torch.empty((8, 9), dtype=torch.float32), requires_grad=False)
        self.l1.b = nn.Parameter(torch.empty((9,), dtype=torch.float32), requires_grad=False)
        self.l1.A0 = nn.Parameter(torch.empty((8, 2), dtype=torch.float32), requires_grad=False)
        self.l1.B0 = nn.Parameter(torch.empty((2, 3), dtype=torch.float32), requires_grad=False)
        self.l1.A1 = nn.Parameter(torch.empty((8, 2), dtype=torch.float32), requires_grad=False)
        self.l1.B1 = nn.Parameter(torch.empty((2, 3), dtype=torch.float32), requires_grad=True)
        self.l1.A2 = nn.Parameter(torch.empty((8, 2), dtype=torch.float32), requires_grad=True)
        self.l1.B2 = nn.Parameter(torch.empty((2, 3), dtype=torch.float32), requires_grad=True)

    def forward(self, v0):
        v1 = einsum(v0, self.l0.W, self.l0.A, self.l0.B, 2.0)
        v2 = v1.contiguous()
        v3 = v2.to(torch.bfloat16)
        h = v3.to(torch.float32) @ self.l1.W + self.l1.b
        h[..., 0:3] += ((v3.to(torch.float32).to(torch.float32) @ self.l1.A0) @ self.l1.B0 * 1.0).to(torch.float32)
        h[..., 3:6] += ((v3.to(torch.float32).to(torch.float32) @ self.l1.A1) @ self.l1.B1 * 2.0).to(torch.float32)
        h[..., 6:9] += ((v3.to(torch.float32).to(torch.float32) @ self.l1.A2) @ self.l1.B2 * 2.0).to(torch.float32)
        p0 = h[..., 0:3]
        p1 = h[..., 3:6]
        p2 = h[..., 6:9]
        v4 = p0 * p1 * p2
        return v4,


class Other(Model):
    def forward(self, v0):
        v1 = einsum(v0, self.l0.W, self.l0.A, self.l0.B, 2.0)
        v2 = v1.contiguous()
        v3 = v2.to(torch.bfloat16)
        h = v3.to(torch.float32) @ self.l1.W + self.l1.b
        p0 = h[..., 0:3]
        p1 = h[..., 3:6]
        p2 = h[..., 6:9]
        p0 = p0 + ((v3.to(torch.float32).to(torch.float32) @ self.l1.A0) @ self.l1.B0 * 1.0).to(torch.float32)
        p1 = p1 + ((v3.to(torch.float32).to(torch.float32) @ self.l1.A1) @ self.l1.B1 * 2.0).to(torch.float32)
        p2 = p2 + ((v3.to(torch.float32).to(torch.float32) @ self.l1.A2) @ self.l1.B2 * 2.0).to(torch.float32)
        v4 = p0 * p1 * p2
        return v4,


def inputs():
    return (torch.empty((2, 3, 3), dtype=torch.bfloat16).requires_grad_(False),)


KIND = 'mixed'
OPTIONS = {'form': 'weight', 'numerics': 'strict', 'rounding': 'nearest', 'keep': 'recompute', 'machine': 'rtx4090', 'adapter_grad': 'auto'}
