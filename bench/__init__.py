"""Memory and time of training adapters: peft_fx against everything a user would otherwise run.

    python -m bench --help

Each measurement is a request (results.py), answered in a fresh process by an experiment (experiment.py and
one each in experiments/), of a model of zoo/ under a variant (variants.py), and stored with every raw sample in
bench/results/*.json, of which tables (tables.py) and figures (figures.py) are made.
"""
