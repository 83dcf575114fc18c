"""Benchmarks: what the runtime reaches, measured; see README.md. Run as ``python -m bench.NAME`` from the
repository."""
