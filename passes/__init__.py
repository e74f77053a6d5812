"""Graph in, graph out: `analyse (pure) -> price (pure) -> rewrite (the only mutation) -> keep -> verify`.

    algebra.py    linear forms: sums of scaled products of matrices, without any graph
    transfer.py   what each ATen op does to a linear form: one short function per op, in one table
    flow.py       what depends on what: backward, weights, random draws; and the names of graph inputs
    sites.py      which sums are a product plus its adapters
    refusals.py   what looks like an adapter and has no weight form, and why
    machine.py    how fast a device is, in a few numbers
    price.py      what each form of a site costs on a machine
    rounding.py   the one place where W' is rounded
    rewrite.py    builds W' and puts it in the place of W; nothing else changes a graph
    keep.py       what backward rebuilds instead of keeping
    verify.py     what must hold of a graph before and after
    pipeline.py   the order of these steps

Symbols as everywhere in the project: `T` tokens, `K` in-features, `N` out-features, `r` rank, `x [T,K]`, `W [K,N]` as
it multiplies x, `A [K,r]`, `B [r,N]`, `s` scale, `dy [T,N]`. `u` is what a group of products shares: x in forward, dy
in backward.
"""
