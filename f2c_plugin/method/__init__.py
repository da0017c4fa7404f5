"""Faster Face Classification (arXiv 2105.10375): one file for each term of the paper."""
