"""Synthetic faces: a labeled dataset without a download."""
