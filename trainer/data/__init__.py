"""Text to batches: tokenizers, Megatron .bin/.idx files, weighted sources, packing."""
