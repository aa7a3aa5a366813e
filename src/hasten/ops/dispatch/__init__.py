"""The ops by their device: names, types and docstrings, and which kernel a tensor goes to.

Each is defined in `hasten.ops.reference`, in plain torch; `cpu/` and `gpu/` hold faster paths with the same signatures.
The kernels of `gpu/` are imported when the first tensor on a GPU comes by.
Shapes: t tokens of the flat batch, h hidden, o output features, n heads, m key/value heads, d head size, v vocabulary.
"""
