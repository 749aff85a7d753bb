"""Training: one pure step, one boring loop, and what they write to disk."""
