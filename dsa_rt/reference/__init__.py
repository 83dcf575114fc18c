"""The definition of every op, in plain PyTorch: functional, fp32 inside, written to be read.

Native, Triton and CUDA versions are alternatives to these functions; tests and benchmarks use them as oracle.
An op of ``dsa_rt.ops`` writes into its outputs, the function of the same name here returns new tensors.
"""

from dsa_rt.reference.step import cached_step, exit_decision, philox_normal, philox_words, renoise

__all__ = ["cached_step", "exit_decision", "philox_normal", "philox_words", "renoise"]
