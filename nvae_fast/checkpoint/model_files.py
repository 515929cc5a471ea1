"""The methods of a model that read and write files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nvae_fast.model import NVAE


class ModelFiles:
    """What NVAE inherits to load and save itself. Everything is imported when it is asked for."""

    def load_nvlabs_state_dict(self: NVAE, state_dict) -> None:
        """Load a state dict with the public code's key names; strict, but for the optional `weight_normalized` twins."""
        from nvae_fast.checkpoint.nvlabs import from_nvlabs_state_dict

        from_nvlabs_state_dict(self, state_dict)

    def save_pretrained(self: NVAE, directory: str | Path) -> None:
        """Write config.json and model.safetensors into `directory` (each file whole or not at all)."""
        from nvae_fast.checkpoint.native import save_model

        save_model(self, directory)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, *, revision: str | None = None, **options: Any) -> NVAE:
        """The model in a folder, or of that name on the Hugging Face Hub (`nvae_fast.hub.fetch`), in eval mode."""
        from nvae_fast.checkpoint.native import load_model
        from nvae_fast.hub import fetch

        return load_model(fetch(name_or_folder, revision=revision, **options))

    def push_to_hub(self: NVAE, repo_id: str, **options: Any) -> str:
        """Upload the model and its card to the Hugging Face Hub (`nvae_fast.hub.push`); returns the page's address."""
        from nvae_fast.hub import push

        return push(self, repo_id, **options)
