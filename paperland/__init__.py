"""Paperland: a drawn world with exact region labels and a small diffusion model trained on it, to see and to measure
the pack with."""
