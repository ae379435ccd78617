"""Transforms: what becomes of the samples of chosen sources before the model sees them."""
