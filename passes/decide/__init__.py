"""Which adapters get their weight form.

candidates.py  what may get one, as adapters, forward and input gradient together
regimes.py     for which numbers of tokens one graph's decisions hold
choosing.py    the choice, told as sites
notation.py    the algebra of a site in plain notation
"""
