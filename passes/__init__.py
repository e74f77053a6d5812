"""Graph in, graph out: `analyse (pure) -> price (pure) -> rewrite (the only mutation) -> keep -> verify`.

    nodes.py       what the passes ask of a node, and the families of ops that they name
    algebra.py     linear forms: sums of scaled products of matrices, without any graph
    transfer.py    what each ATen op does to a linear form: one short function per op, in one table
    flow.py        what depends on what: backward, weights, random draws; and the names of graph inputs
    identities.py  products with an identity are their other operand
    factors.py     a vector that every addend of a sum carries, taken out of it
    quantised.py   a product fused with its weight's dequantisation, opened where an adapter joins
    adapters.py    what an adapter is: the definition that all who look for one ask
    sites.py       which sums are a product plus its adapters
    affine.py      which values are, row by row, an affine map of one source
    regions.py     which of these maps are an adapter that is no sum of products
    replay.py      such a map run on the rows of an identity in place of the tokens
    refusals/      what looks like an adapter and has no weight form, and why
    merged.py      which adapters the model adds to the weight itself
    machine.py     how fast a device is, in a few numbers
    price.py       what each form of a site costs on a machine
    regimes.py     for which numbers of tokens one graph's decisions hold
    rounding.py    the one place where W' is rounded
    rewrite.py     builds W' and puts it in the place of W
    moments.py     gradients of vectors behind a layer, from xᵀ·dy
    transients.py  adapters' gradients without copies of activations
    scaled_reads.py  and without scaled copies of them
    narrow.py      their products by kernels of our own
    keep.py        what backward rebuilds instead of keeping
    snapshots.py   copies of what forward writes, for backward
    halves.py      forward and backward for a given set of values kept, and what a step of them takes
    budget.py      which values to keep, and which to make again, so that a step fits a number of bytes
    cut.py         the least cut of a network, by which they are chosen
    verify.py      what must hold of a graph before and after
    pipeline.py    the order of these steps

Symbols as everywhere in the project: `T` tokens, `K` in-features, `N` out-features, `r` rank, `x [T,K]`, `W [K,N]` as
it multiplies x, `A [K,r]`, `B [r,N]`, `s` scale, `dy [T,N]`. `u` is what a group of products shares: x in forward, dy
in backward.
"""
