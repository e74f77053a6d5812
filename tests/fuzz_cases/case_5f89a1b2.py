"""Seed 5, case 89: backward reads an input that was changed in place since"""

import torch
import torch.nn.functional as F
from torch import nn

def einsum_tokens(x, W, A, B, s):
    return torch.einsum("btk,kn->btn", x, W) + torch.einsum("btk,kr,rn->btn", x, A, B) * s



class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.l0 = nn.Module()
        self.l1 = nn.Module()
        self.l0.W = nn.Parameter(torch.empty((5, 2), dtype=torch.float64), requires_grad=False)
        self.l0.A = nn.Parameter(torch.empty((5, 2), dtype=torch.float64), requires_grad=True)
        self.l0.B = nn.Parameter(torch.empty((2, 2), dtype=torch.float64), requires_grad=True)
        self.l1.W = nn.Parameter(torch.empty((5, 5), dtype=torch.float64), requires_grad=False)
        self.l1.B = nn.Parameter(torch.empty((2, 5), dtype=torch.float64), requires_grad=False)

    def forward(self, v0):
        h = v0 * 2
        v1 = h @ self.l0.W
        h.relu_()
        v1 = v1 + (h @ self.l0.A) @ self.l0.B * -1.0
        v0.sub_(v0)
        v2 = einsum_tokens(v0, self.l1.W, self.l0.W, self.l1.B, 0.5)
        return v1, v2,


def inputs():
    return (torch.empty((2, 3, 5), dtype=torch.float64).requires_grad_(True),)


KIND = 'exact'
OPTIONS = {'form': 'weight', 'numerics': 'default', 'rounding': 'dithered', 'keep': 'recompute', 'machine': 'rtx4090'}
