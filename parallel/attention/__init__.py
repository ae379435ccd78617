"""Core attention without Transformer Engine, and context parallelism in three ways."""

from parallel.attention.exchange import ulysses_problem
from parallel.attention.portable import CONTEXT_KINDS, PortableAttention

__all__ = ["CONTEXT_KINDS", "PortableAttention", "ulysses_problem"]
