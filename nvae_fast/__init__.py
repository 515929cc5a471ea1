"""NVAE, fast: a deep hierarchical VAE, its layers and its fused kernels."""

from nvae_fast._version import __version__
from nvae_fast.checkpoint.nvlabs import load_nvlabs_checkpoint, save_nvlabs_checkpoint, to_nvlabs_state_dict
from nvae_fast.config import NVAEConfig, TrainConfig
from nvae_fast.errors import InputError, RunError
from nvae_fast.kernels._impl import use_impl
from nvae_fast.model import NVAE, NVAEOutput
from nvae_fast.presets import PRESETS
from nvae_fast.regularization import SpectralState

__all__ = [
    "NVAE",
    "PRESETS",
    "InputError",
    "NVAEConfig",
    "NVAEOutput",
    "RunError",
    "SpectralState",
    "TrainConfig",
    "__version__",
    "load_nvlabs_checkpoint",
    "save_nvlabs_checkpoint",
    "to_nvlabs_state_dict",
    "use_impl",
]
