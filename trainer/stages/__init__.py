"""Stages: what a run does one after the other, and what each keeps of the checkpoint that it starts from."""
