"""What comes before any analysis: the same values, in the words that the analysis knows.

identities.py     products with an identity, sums of rows of one number
columns.py        what is put together from its own columns
vector_sums.py    sums whose addends carry vectors
common_vector.py  a vector that every addend carries, taken out
fused_layers.py   adapters of parts of a layer's result, as one of the whole
fused_weights.py  a product fused with its weight's dequantisation, opened
"""
