"""Noise levels and steps: numbers and tensors; no network, no text."""
