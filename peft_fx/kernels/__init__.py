"""Kernels of our own, for what Inductor makes of several: each is an op of the library `peft_fx`, with a decomposition
into ATen that says what it computes.

    library.py        an op: schema, decomposition, shape, and what launches it on a GPU
    merge.py          W' = round(W + Σ s·L·R) of several weights in one launch
    triton_merge.py   its Triton kernel
    narrow.py         u·A and uᵀ·g of several activations u in one launch, each read once
    triton_narrow.py  their Triton kernels
    trial.py          whether all that works on a device

A CPU runs the decomposition, and so does every device that has no Triton; no pass puts such an op into a graph that is
not on a CUDA device (`available`), or into one on a device where the trial failed. Nothing here knows of graphs: the
passes import this package, and it imports none of theirs.
"""
