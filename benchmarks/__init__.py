"""Measurements. Nothing here is asserted by a test, and nothing here is needed to train."""
