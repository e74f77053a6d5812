"""Graph in, graph out: an adapted model's joint graph, rewritten. `pipeline.PASSES` is the order.

    findings.py  what is asked of the passes, and what they tell: settings, sites, refusals. Data
    graph/       a graph, what is known of it, and the one way to change it
    normalise/   the same values, in the words that the analysis knows
    analyse/     what is in a graph: sums, maps, adapters, and what has no weight form
    decide/      which adapters get their weight form: machines, prices, the choice
    rewrite/     adapters in weight form in the place of what they were
    keep/        what adapters' gradients are made of, and what backward keeps for them
    loss/        a language model's loss, a few rows of the logits at a time
    verify.py    what must hold of a graph before and after
    pipeline.py  the table of passes, and `run`

What holds everywhere:

- A pass is given a Joint and the Settings. It changes the graph through `joint.edit` alone, tells in `joint.found` what
  users hear of, and in `joint.notes` what a later pass needs.
- An analysis is made once for each state of the graph: `joint.flow`, `joint.sums`, `joint.maps`. It is pure.
- An op without a rule is a name of its own, never a guess.
- W is never written; W' is built in a wider dtype, rounded once, made again in backward and not kept.
- Order in the graph decides ties, never that of a set: each run and each rank makes the same graph.
- Whatever fails, the caller has the untouched graph, and training goes on.

Symbols as everywhere in the project: `T` tokens, `K` in-features, `N` out-features, `r` rank, `x [T,K]`, `W [K,N]` as
it multiplies x, `A [K,r]`, `B [r,N]`, `s` scale, `dy [T,N]`. `u` is what a group of products shares: x in forward, dy
in backward.
"""
