"""What changes a run beside its data and its schedule, with state in the checkpoint."""
