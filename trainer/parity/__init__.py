"""The logits gate: the same numbers as transformers, at every position, on any layout."""
