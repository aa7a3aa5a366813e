"""FasterTransformer's folders: what all have in common, a file per family, and which family a folder is of."""
