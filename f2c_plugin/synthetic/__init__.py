"""Synthetic faces: a labelled dataset without a download."""
