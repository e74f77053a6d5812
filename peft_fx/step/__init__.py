"""What a step takes, as Inductor will run it: kernels, bytes, seconds; and what to keep so that it fits a budget."""
