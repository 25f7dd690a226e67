"""Benchmarks against named baselines; each script runs alone and prints ratios beside its times."""
