"""What a step takes, as Inductor will run it, and what to keep so that it fits a budget.

kinds.py     what kind of work an op is
fusion.py    a graph as kernels: what exists, and what is fused
schedule.py  the order of kernels
seconds.py   their seconds
memory.py    what is alive at each of them
traced.py    a step of graphs that were split in two: bytes by component, seconds, other depths and lengths
halves.py    a joint graph as forward and backward, for a given set of values kept
cut.py       the least cut of a network
repeats.py   what may be made again
budget.py    which values to keep, so that a step fits a number of bytes
"""
