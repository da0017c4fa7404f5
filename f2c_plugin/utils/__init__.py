"""Helpers that know nothing of faces."""
