"""Adapters in weight form in the place of what they were.

merge_sums.py       `u·W + s·(u·A)·B` as `u·W'`
merge_maps.py       a map's region as `u·W' + b'`
materialise.py      a map run on the rows of an identity in place of the tokens
rounding.py         the one place where W' is rounded
layout.py           the order in which W' lies in memory
merges_together.py  several W' by one launch of a kernel
"""
