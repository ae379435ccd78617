"""How long a collective waits for a rank that does not come, in every process group."""

TIMEOUT_MINUTES = 10
