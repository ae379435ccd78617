"""What acts on the update instead of the gradient: frozen weights, anchors, slow weights."""
