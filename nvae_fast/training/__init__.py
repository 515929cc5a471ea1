"""Training: the loop, its data, its log, and its signals."""

from nvae_fast.training.loop import Trainer
from nvae_fast.training.signals import Interrupted

__all__ = ["Interrupted", "Trainer"]
