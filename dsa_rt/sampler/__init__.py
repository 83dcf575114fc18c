"""Sampling loops: ``rollout`` (autoregressive, chunk by chunk) and ``ode`` (bidirectional, many steps)."""
