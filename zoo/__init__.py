"""Models and adapters, small and with random weights, as data: what the tests prove things of and the bench measures.

architectures.py  model classes of transformers and diffusers, by one set of sizes
models.py         models to be measured, in any size and dtype, with adapters, and their batches
methods.py        PEFT's configurations, each on a block of two layers
packages.py       adapters of other packages, each on the same block
"""
