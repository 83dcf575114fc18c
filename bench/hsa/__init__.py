"""HSA measured: quality against its rivals at equal run time, the strength of extrapolation, and time by token share.

    python -m bench.hsa                # quality on held-out prompts of the many-step demo
    python -m bench.hsa --strength     # how much to extrapolate, by the length of the gap
    python -m bench.hsa --speed        # run time against the share of token-steps; diffusers' model beside ours
"""
