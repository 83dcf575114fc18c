"""HSA measured: quality against its rivals at equal run time, the strength of extrapolation, time by token share, and
K/V storages.

    python -m bench.hsa                # quality on held-out prompts of the many-step demo
    python -m bench.hsa --strength     # how much to extrapolate, by the length of the gap
    python -m bench.hsa --speed        # run time against the share of token-steps; diffusers' model beside ours
    python -m bench.hsa --storage      # FP8 and host K/V: PSNR to the model's dtype, memory against the plan
"""
