"""Memory and time of training adapters: peft_fx against everything a user would otherwise run.

    python -m bench --help

Each measurement is a `Setup` (models.py) under a variant (variants.py), taken in a fresh process (worker.py) and stored
with every raw sample in bench/results/*.json (results.py), of which `python -m bench report` makes tables and figures.
"""
