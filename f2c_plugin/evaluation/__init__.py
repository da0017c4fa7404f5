"""Verification, model selection, ONNX export, and monitoring of the head."""
