"""The universal checkpoint language: what a source's tensors mean. Reference: docs/checkpoint-language.md."""
