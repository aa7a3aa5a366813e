"""The ops of `reference.py` as kernels in the Triton language, with the same signatures."""
