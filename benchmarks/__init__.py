"""Benchmarks of fused_opt against other optimizers and averages; `python -m benchmarks --help`.

An installed fused_opt holds the same modules as fused_opt.benchmarks.
"""
