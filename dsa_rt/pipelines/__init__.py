"""Pipelines of other libraries, run by this one: ``dsa_rt.attach`` for diffusers' Wan pipelines."""
