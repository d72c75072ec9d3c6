"""Benchmarks of fused_opt against torch's own optimizers; run them with `python -m benchmarks`."""
