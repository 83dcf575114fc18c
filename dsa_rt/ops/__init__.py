"""The ops of the runtime: one Python function each, outputs among the arguments, one definition in
:mod:`dsa_rt.reference`, and the choice of what runs in :mod:`dsa_rt.ops.backend`.

Families: :mod:`dsa_rt.ops.step` (noise, Euler step, exit decision), :mod:`dsa_rt.ops.attention` and
:mod:`dsa_rt.ops.layers` (the transformer).
"""
