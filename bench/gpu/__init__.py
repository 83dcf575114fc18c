"""Benchmarks and checks on a GPU, run by bench/gpu.sh; docs/gpu.md says how."""
