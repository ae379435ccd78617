"""How fast checkpoints are converted and resharded, beside the trainers' own tools: see `__main__`."""
