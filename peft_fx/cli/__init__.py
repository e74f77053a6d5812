"""The command line's commands, `python -m peft_fx <command>`: each a function that declares its arguments, and one that
runs.

demo.py       a small Llama with PEFT LoRA, trained three ways from the same start
explain.py    what is made of a model that is there as a configuration alone
estimate.py   what training it takes
calibrate.py  how fast this machine is, measured and stored
configs.py    a model from its configuration, and the arguments that describe it
terminal.py   progress on stderr, and problems that say what to do
"""
