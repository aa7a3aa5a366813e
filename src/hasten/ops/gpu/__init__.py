"""The ops of `reference/` as kernels in the Triton language, with the same signatures."""
