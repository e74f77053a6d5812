"""Which adapters get their weight form. Nothing here changes a graph.

machine.py     how fast a device is, in a few numbers: MACHINES, one row each
shapes.py      what is priced: a candidate's sizes as numbers
price.py       what each form of a site costs on a machine
regimes.py     for which numbers of tokens one graph's decisions hold
candidates.py  what may get a weight form, as adapters: forward and input gradient together
choosing.py    the choice, told as sites
notation.py    the algebra of a site in plain notation
"""
