"""Losses beside the cross-entropy: z-loss, and the divergence from a frozen reference."""
