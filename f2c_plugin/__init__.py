"""F²C (Faster Face Classification, CVPR 2022) for InsightFace's arcface_torch."""

__version__ = "0.1.0"
