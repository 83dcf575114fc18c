"""Benchmarks: what the runtime reaches, measured. Run as ``python -m bench.NAME``; see README.md."""
