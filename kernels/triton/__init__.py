"""Triton versions of the ops, by the names they have in :mod:`dsa_rt.ops`. None yet."""
