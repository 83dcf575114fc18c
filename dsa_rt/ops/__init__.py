"""The ops of the runtime: one Python function each, outputs among the arguments, one definition in
:mod:`dsa_rt.reference`, and the choice of what runs in :mod:`dsa_rt.ops.backend`.

Families: :mod:`dsa_rt.ops.step` (noise, Euler step, exit decision), :mod:`dsa_rt.ops.norm`, :mod:`dsa_rt.ops.rope`,
:mod:`dsa_rt.ops.attention`, :mod:`dsa_rt.ops.linear`, :mod:`dsa_rt.ops.rows` and :mod:`dsa_rt.ops.pool` (the
transformer and the confidence head). :mod:`dsa_rt.ops.layers` is what models call: it returns its results and is
differentiable where that is wanted.
"""
