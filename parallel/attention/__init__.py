"""Core attention without Transformer Engine, and context parallelism in three ways."""

from parallel.attention.portable import PortableAttention

__all__ = ["PortableAttention"]
