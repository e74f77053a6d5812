"""What a step takes, as Inductor will run it: kernels, bytes, seconds; and what to keep for it to fit a memory budget."""
