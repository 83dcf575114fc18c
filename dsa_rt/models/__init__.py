"""Weights and forward passes in token space."""
