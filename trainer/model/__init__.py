"""What is trained: the architecture of a model, where it is read from, and what it is made of."""
