"""Published checkpoints into bundles, tensor by tensor.

::

    convert("Wan2.1-T2V-1.3B-Diffusers", "wan-1.3b", dtype="bf16")
    convert("self_forcing_dmd.pt", "self-forcing", components=["Wan2.1-T2V-1.3B-Diffusers"], dtype="bf16")

``finding`` says what a checkpoint is, ``parts`` which tensor comes from where (``names``: what it is called),
``sources`` reads tensors one at a time, ``writing`` writes them so that an interrupted export goes on.
"""

from dsa_rt.convert.converting import Choices, convert

__all__ = ["Choices", "convert"]
