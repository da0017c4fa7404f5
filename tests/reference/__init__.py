"""Slow, obvious versions of the pool, the loss and the head, to check against the paper."""
