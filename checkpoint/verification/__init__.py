"""Whether a checkpoint is whole and right, what it is like beside another, and why it may be damaged."""
