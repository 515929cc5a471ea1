"""Models on the Hugging Face Hub, and the same as plain folders: weights, configuration, model card, scores, samples."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvae_fast.checkpoint.files import atomic_write
from nvae_fast.checkpoint.native import CONFIG, MODEL, save_model
from nvae_fast.config import NVAEConfig
from nvae_fast.errors import InputError, RunError
from nvae_fast.model import NVAE

CARD, SCORES, PICTURE = "README.md", "evaluation.json", "samples.png"
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def fetch(name_or_folder: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None,
          token: str | None = None, local_files_only: bool = False) -> Path:  # fmt: skip
    """The folder of a model: the one that is there, else a download of "owner/model" from the Hub, kept in its cache.

    Only configuration and weights are fetched, JSON and safetensors, neither of which can run code. `revision` is a branch, tag
    or commit. InputError when there is neither, when huggingface_hub is not installed, or when the Hub refuses.
    """
    path = Path(name_or_folder)
    if path.exists():
        if revision is not None:
            raise InputError(f"revision '{revision}': '{path}' is a folder here, which has none; leave it out")
        return path
    if not _NAME.fullmatch(str(name_or_folder)):
        raise InputError(f"no checkpoint at '{path}': give a folder, or a name on the Hugging Face Hub, as owner/model")
    hub = _module()
    try:
        return Path(hub.snapshot_download(str(name_or_folder), revision=revision, cache_dir=cache_dir, token=token,
                                          local_files_only=local_files_only, allow_patterns=[CONFIG, MODEL]))  # fmt: skip
    except Exception as error:  # whatever a network, a server or a cache comes up with
        raise InputError(
            f"cannot get '{name_or_folder}' from the Hugging Face Hub ({_line(error)}): check the name, the revision and the "
            "network, or give a folder"
        ) from None


def export(model: NVAE, folder: str | Path, *, run: str | Path | None = None, license: str = "unknown",
           name: str | None = None) -> Path:  # fmt: skip
    """Write what the Hub gets into a folder, which `NVAE.from_pretrained` takes as it is: weights, configuration, model card,
    and from the folder `run` evaluation.json and samples.png where they are. `license`: a Hub identifier, as "apache-2.0"."""
    folder = Path(folder)
    save_model(model, folder)
    scores = {}
    for file in (SCORES, PICTURE) if run is not None else ():
        source = Path(run) / file
        if source.is_file() and source.resolve() != (folder / file).resolve():
            content = source.read_bytes()
            atomic_write(folder / file, lambda out, content=content: out.write(content))
    if (folder / SCORES).is_file():
        try:
            scores = json.loads((folder / SCORES).read_bytes())
        except ValueError as error:
            raise InputError(f"'{folder / SCORES}' is not valid JSON ({error}): evaluate the model again") from None
    size = sum(p.numel() for p in model.parameters())
    card = model_card(model.config, scores if isinstance(scores, dict) else {}, license=license, parameters=size,
                      name=name or model.config.name, picture=(folder / PICTURE).is_file())  # fmt: skip
    atomic_write(folder / CARD, lambda out: out.write(card.encode()))
    return folder


def push(model: NVAE, repo_id: str, *, run: str | Path | None = None, license: str = "unknown", revision: str | None = None,
         private: bool = False, message: str = "Upload NVAE", token: str | None = None) -> str:  # fmt: skip
    """Upload `export(model)` to the Hub as "owner/model", made if it is not there (and the branch `revision` likewise).

    Returns the address of the page. InputError without huggingface_hub or for another kind of name, RunError when the Hub
    refuses.
    """
    if not _NAME.fullmatch(repo_id):
        raise InputError(f"'{repo_id}' is no name on the Hugging Face Hub: give it as owner/model")
    hub = _module()
    with tempfile.TemporaryDirectory() as folder:
        export(model, folder, run=run, license=license, name=repo_id)
        try:
            api = hub.HfApi(token=token)
            address = str(api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model"))
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message)
        except Exception as error:
            raise RunError(
                f"the Hugging Face Hub did not take '{repo_id}' ({_line(error)}): log in with `hf auth login`, or pass a token"
            ) from None
    return address


def model_card(config: NVAEConfig, scores: Mapping[str, Any], *, license: str, parameters: int, name: str,
               picture: bool) -> str:  # fmt: skip
    """README.md for the Hub: what the model is, its scores, how to use it, its configuration."""
    c, t = config, config.training
    height, width = c.data_size
    source = name if _NAME.fullmatch(name) else "path/to/this/folder"
    lines = ["---", f"license: {json.dumps(license)}", "library_name: nvae_fast",
             "pipeline_tag: unconditional-image-generation", "tags: [vae, nvae, image-generation]", "---", "",
             f"# {name}", "",
             f"An NVAE (Vahdat & Kautz, NeurIPS 2020) of {parameters / 1e6:.2f} M parameters and {len(c.latent_shapes)} latent "
             f"groups, for images of {c.channels} x {height} x {width} (channels, height, width), {c.output_likelihood} "
             f"likelihood, trained on `{t.data}`{f' ({t.dataset})' if t.dataset else ''}."]  # fmt: skip
    if picture:
        lines += ["", f"![samples]({PICTURE})"]
    if rows := _score_rows(scores):
        lines += ["", "## Evaluation", "", "| what | value | on |", "|---|---|---|", *rows]
    lines += [
        "", "## Use", "", "```python", "import nvae_fast", "", f"model = nvae_fast.NVAE.from_pretrained({json.dumps(source)})",
        "logits = model.sample(16, temperature=0.7)",
        "images = model.decoder_output(logits).mean  # [16, C, H, W] in [0, 1]", "```", "",
        "## Configuration", "", "```json", json.dumps(c.to_dict(), indent=1), "```", "",
        f"Licence of the weights: {license}.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _score_rows(scores: Mapping[str, Any]) -> list[str]:
    rows = []
    images = f"{scores.get('images')} images of {scores.get('data')} ({scores.get('split')})"
    for key, what in (("nelbo", "-ELBO"), ("neg_log_p", f"-log p(x), {scores.get('num_iw_samples')} importance samples")):
        value, per_dim, error = (scores.get(key + end) for end in ("", "_bpd", "_se"))
        if _number(value) and _number(per_dim):
            error = f" +- {error:.2f}" if _number(error) else ""
            rows.append(f"| {what} | {value:.2f}{error} nats, {per_dim:.4f} bits/dim | {images} |")
    distances = scores.get("distances")
    for label, d in distances.items() if isinstance(distances, dict) else ():
        if isinstance(d, dict) and _number(d.get("value")):
            adjusted = ", BN re-adjusted" if d.get("readjusted_bn") else ""
            how = f"{d.get('samples')} samples at temperature {d.get('temperature')}{adjusted}"
            rows.append(f"| {label} | {d['value']:.4g} | {how}, {d.get('reference_images')} images ({d.get('split')}) |")
    return rows


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _module() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            "the Hugging Face Hub needs huggingface_hub, which is not installed: pip install 'nvae_fast[hub]', or use a folder"
        ) from None
    return huggingface_hub


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
