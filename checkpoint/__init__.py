"""What survives a run: logical tensors made of pieces, saved once and read on any layout."""
