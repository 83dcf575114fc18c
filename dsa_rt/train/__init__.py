"""The demo's training recipe: codec, many-step generator, few-step causal student, confidence head, calibration."""
