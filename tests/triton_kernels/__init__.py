"""The Triton kernels: interpreted on the CPU, compiled without a GPU, run on one.

The folder is not called ``triton``: tests/ is on the import path, and it would stand before the real one.
"""
