"""Traces of routing: one schema, its files, and readers of what others write."""

from moejax.tracing.files import Part, TraceFiles, TraceWriter, open_trace
from moejax.tracing.rows import trace_of_rows
from moejax.tracing.schema import Trace, TraceMeta, concatenate

__all__ = [
    "Part",
    "Trace",
    "TraceFiles",
    "TraceMeta",
    "TraceWriter",
    "concatenate",
    "open_trace",
    "trace_of_rows",
]
