"""Tests of kernels/cuda. NVIDIA's own Python packages are called cuda too: they stay importable beside this one."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
