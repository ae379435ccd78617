"""Passing over tensors of any size in panels of bounded memory."""
