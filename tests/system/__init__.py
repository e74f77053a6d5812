"""Whole training runs: PEFT, trainers, architectures, several processes, examples."""
