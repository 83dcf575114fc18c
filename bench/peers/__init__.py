"""What others run, on the same weights in the same process: the published Self-Forcing loop, gather-based token
skipping, diffusers' model and, where it is installed, FlashAttention."""
