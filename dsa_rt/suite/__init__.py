"""The benchmark suite behind ``dsa-rt bench``: cases as data, one way to measure them, and records to
compare.

Nothing here is imported by the runtime.
"""
