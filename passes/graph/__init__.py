"""A graph, what is known of it, and the one way to change it.

nodes.py    what the passes ask of a node, and the families of ops that they name
columns.py  values as columns of others: slices, splits, what is put side by side
fakes.py    what ops make of fake values, known from their likes
editor.py   the only place that changes a graph
joint.py    a graph with all that is known of it, made once for each state: what every pass is given
"""
