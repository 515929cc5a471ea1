"""The Hub without a network: a module of its name that keeps repositories in a folder."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml

from nvae_fast import NVAE, InputError, RunError
from nvae_fast.hub import export
from nvae_fast.images import save_grid


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """huggingface_hub as far as it is used here; repositories lie in `.root`/owner/name/branch, calls in `.calls`."""
    module = types.ModuleType("huggingface_hub")
    module.root, module.calls = tmp_path / "hub", []

    class HfApi:
        def __init__(self, token=None):
            if token == "wrong":
                raise PermissionError("401 Client Error.\n\nInvalid token")

        def create_repo(self, repo_id, *, private, exist_ok, repo_type):
            assert exist_ok and repo_type == "model"
            (module.root / repo_id / "main").mkdir(parents=True, exist_ok=True)
            return f"https://hub/{repo_id}"

        def create_branch(self, repo_id, *, branch, exist_ok):
            (module.root / repo_id / branch).mkdir(exist_ok=exist_ok)

        def upload_folder(self, *, repo_id, folder_path, revision, commit_message):
            shutil.copytree(folder_path, module.root / repo_id / (revision or "main"), dirs_exist_ok=True)

    def snapshot_download(repo_id, *, revision, cache_dir, token, local_files_only, allow_patterns):
        module.calls.append((repo_id, revision, cache_dir, local_files_only))
        source = module.root / repo_id / (revision or "main")
        if local_files_only or not source.exists():
            raise FileNotFoundError("404 Client Error.\n(Request ID: 1)\n\nRepository Not Found")
        target = Path(cache_dir or tmp_path / "cache") / repo_id / (revision or "main")
        target.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            shutil.copy(source / name, target / name)
        return str(target)

    module.HfApi, module.snapshot_download = HfApi, snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


def same(a, b):
    return a.config == b.config and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    save_grid(torch.rand(4, 1, 8, 8), folder / "samples.png", 2)
    scores = {"nelbo": 253.06, "nelbo_bpd": 0.4657, "nelbo_se": 2.4, "neg_log_p": 249.46, "neg_log_p_bpd": 0.459,
              "neg_log_p_se": None, "num_iw_samples": 10, "images": 1000, "data": "demo", "split": "valid",
              "distances": {"FD-randconv": {"value": 1.1, "samples": 2000, "temperature": 0.7, "reference_images": 9000,
                                            "split": "train", "readjusted_bn": True}}}  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(scores))
    return folder


def test_there_and_back(make, hub, run, tmp_path):
    model = make()
    assert model.push_to_hub("ada/tiny", run=run, license="mit") == "https://hub/ada/tiny"
    stored = hub.root / "ada/tiny/main"
    assert {p.name for p in stored.iterdir()} == {
        "config.json", "model.safetensors", "README.md", "evaluation.json", "samples.png"}  # fmt: skip
    got = NVAE.from_pretrained("ada/tiny")
    assert same(got, model) and not got.training
    other = make(seed=1)
    other.push_to_hub("ada/tiny", revision="v2")
    assert same(NVAE.from_pretrained("ada/tiny", revision="v2", cache_dir=tmp_path / "c"), other)
    assert same(NVAE.from_pretrained("ada/tiny"), model)
    assert hub.calls[1] == ("ada/tiny", "v2", tmp_path / "c", False)
    fetched = {p.name for p in (tmp_path / "c").rglob("*") if p.is_file()}
    assert fetched == {"config.json", "model.safetensors"}  # nothing else is downloaded


def test_a_folder_is_the_same_without_the_hub(make, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model = make()
    folder = export(model, tmp_path / "out", run=run, license="mit")
    assert same(NVAE.from_pretrained(folder), model) and same(NVAE.from_pretrained(str(folder)), model)
    assert (folder / "samples.png").read_bytes() == (run / "samples.png").read_bytes()
    export(model, folder, run=folder)  # onto itself
    assert (folder / "samples.png").read_bytes() == (run / "samples.png").read_bytes()


def test_the_card(make, run, tmp_path):
    folder = export(make(), tmp_path / "out", run=run, license='mit"\nx: 1')
    text = (folder / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["license"] == 'mit"\nx: 1' and front["library_name"] == "nvae_fast" and "x" not in front
    assert "| -ELBO | 253.06 +- 2.40 nats, 0.4657 bits/dim | 1000 images of demo (valid) |" in body
    assert "| -log p(x), 10 importance samples | 249.46 nats, 0.4590 bits/dim |" in body
    assert "| FD-randconv | 1.1 | 2000 samples at temperature 0.7, BN re-adjusted, 9000 images (train) |" in body
    assert "![samples](samples.png)" in body and "FID" not in body
    config = json.loads(body.split("```json\n")[1].split("```")[0])
    assert config == json.loads((folder / "config.json").read_text())
    (run / "evaluation.json").write_text('{"nelbo": 3, "neg_log_p": "x", "distances": {"a": 1, "b": {"value": null}}}')
    assert "Evaluation" not in (export(make(), tmp_path / "odd", run=run) / "README.md").read_text()
    bare = (export(make(), tmp_path / "bare") / "README.md").read_text()
    assert "Evaluation" not in bare and "![samples]" not in bare and 'license: "unknown"' in bare


def test_one_line_for_everything_that_goes_wrong(make, hub, run, tmp_path, monkeypatch):
    def line(call, *parts, kind=InputError):
        with pytest.raises(kind) as caught:
            call()
        message = str(caught.value)
        assert "\n" not in message and all(part in message for part in parts), message

    model = make()
    line(lambda: NVAE.from_pretrained("ada/none"), "cannot get 'ada/none'", "Repository Not Found", "give a folder")
    line(lambda: NVAE.from_pretrained("ada/none", local_files_only=True), "cannot get 'ada/none'")
    line(lambda: NVAE.from_pretrained("/no/such/place"), "no checkpoint at '/no/such/place'", "owner/model")
    line(lambda: NVAE.from_pretrained(run), "holds no model.safetensors")
    line(lambda: NVAE.from_pretrained(run, revision="v1"), "revision 'v1'", "is a folder here")
    line(lambda: model.push_to_hub("tiny"), "'tiny' is no name", "owner/model")
    line(lambda: model.push_to_hub("ada/tiny", token="wrong"), "did not take 'ada/tiny' (401", "log in", kind=RunError)
    (run / "evaluation.json").write_text("{")
    line(lambda: export(model, tmp_path / "out", run=run), "evaluation.json' is not valid JSON")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: NVAE.from_pretrained("ada/tiny"), lambda: model.push_to_hub("ada/tiny")):
        line(call, "huggingface_hub, which is not installed: pip install 'nvae_fast[hub]'")
