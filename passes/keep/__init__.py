"""What adapters' gradients are made of, and what backward keeps for them.

chains.py          what backward rebuilds instead of keeping, and from what
recompute.py       the pass that tells the partitioner
contractions.py    sums over tokens that can be had from xᵀ·dy
dense_grads.py     gradients of vectors behind a layer, from these
copies.py          products that read copies of activations, and which of them may be one
half_products.py   products of half precision that lose nothing
in_place_reads.py  adapters' gradients without copies of activations
narrow.py          their products by kernels of our own
by_chunks.py       their products a few tokens at a time
scaled_reads.py    and without scaled copies of activations
policies.py        lossy ways to keep an activation: POLICIES, one class each
approximation.py   where they act: parts kept, and an approximation for adapters' gradients alone
changed_inputs.py  copies of what forward writes, for backward
"""
