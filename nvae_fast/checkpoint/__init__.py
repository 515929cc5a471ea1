"""Checkpoints: the own format (native.py) and the public code's (nvlabs.py). Reading one never runs code from it."""
