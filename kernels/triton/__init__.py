"""Triton versions of the ops, by the names they have in :mod:`dsa_rt.ops`: a file per family, imported with its first
use, so that ``import dsa_rt`` does not import Triton.

Every function writes into its outputs, launches on the current stream of the current device, which must be that of its
tensors, allocates nothing and waits for nothing. Shapes, dtypes and strides are checked by :mod:`dsa_rt.ops`, not here.
Where a row number lies outside its table, the kernel skips that row: nothing is read or written for it.

``docs/kernels/triton.md`` has bytes, operations and the reasons for what is done how.
"""
