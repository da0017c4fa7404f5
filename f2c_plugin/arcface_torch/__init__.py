"""The seam to arcface_torch: entry points, the head as its training script calls it, and the patches."""
