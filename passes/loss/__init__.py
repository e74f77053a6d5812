"""A language model's loss, a few rows of the logits at a time.

row_rules.py  what each op does to the rows of a tensor: ROWS, one rule an op
chunking.py   how many rows at a time
region.py     what is done for each of them
body.py       that, as a graph of its own
loop.py       the loop in its place
"""
