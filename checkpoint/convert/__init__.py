"""Writing checkpoints of any format: one pass from the source's bytes to the target's, in bounded memory."""
