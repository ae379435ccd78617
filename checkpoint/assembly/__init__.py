"""From the tensors of a foreign checkpoint to logical ones: sources, their parts, and the manifest."""
