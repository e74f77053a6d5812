"""What is in a graph. Nothing here changes one.

algebra.py       linear forms: sums of scaled products of matrices, without any graph
flow.py          what depends on what: backward, weights, random draws; names of graph inputs
linear_rules.py  what each op does to a linear form: LINEAR, one rule an op
reader.py        the linear forms of a graph
dims.py          what the dimensions of a value count: tokens, or features
affine_rules.py  which dimensions of an op's result count tokens: AFFINE, one rule an op
maps.py          which values are, row by row, an affine map of one source
adapters.py      what an adapter is: the definition that all who look for one ask
candidates.py    what may get a weight form: a sum's adapter, or a map's
sums.py          which sums are a product plus its adapters
regions.py       which maps are an adapter that is no sum of products
merged.py        which adapters the model adds to the weight itself
find.py          the pass that notes all of them
refusals/        what looks like an adapter and has no weight form, and why
"""
