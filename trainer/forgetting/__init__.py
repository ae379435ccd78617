"""Forgetting: what a run's held-out losses say about what it still knows, stage by stage and step by step."""
