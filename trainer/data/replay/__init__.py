"""Replay: a source whose documents are those that the run has read before."""
