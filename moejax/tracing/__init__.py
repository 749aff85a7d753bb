"""Traces of routing: one schema, its files, and readers of what others write."""

from moejax.tracing.schema import Trace, TraceMeta, concatenate

__all__ = ["Trace", "TraceMeta", "concatenate"]
