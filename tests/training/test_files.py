"""Files are whole or absent: failed writes, full disks, unwritable places, damaged checkpoints."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nvae_fast.checkpoint.files import atomic_folder, atomic_write
from nvae_fast.checkpoint.native import save_model
from nvae_fast.errors import InputError


def no_space(file):
    file.write(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failing_torch_save(file):
    class Full:
        def write(self, data):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        def flush(self):
            pass

    torch.save({"x": torch.zeros(10)}, Full())


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("write", [no_space, failing_torch_save])
def test_a_failed_write_leaves_the_old_file(tmp_path, old, write):
    path = tmp_path / "file"
    if old is not None:
        atomic_write(path, lambda file: file.write(old))
    with pytest.raises(InputError, match=r"^cannot write to '.*/file': .*; free some space$"):
        atomic_write(path, write)
    assert (path.read_bytes() if path.exists() else None) == old
    assert [p.name for p in tmp_path.iterdir()] == (["file"] if old else [])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, RuntimeError])
def test_other_failures_pass_through(tmp_path, error):
    def write(file):
        file.write(b"half")
        raise error

    atomic_write(tmp_path / "file", lambda file: file.write(b"old"))
    with pytest.raises(error):
        atomic_write(tmp_path / "file", write)
    assert (tmp_path / "file").read_bytes() == b"old"
    with pytest.raises(error), atomic_folder(tmp_path / "folder") as folder:
        (folder / "a").write_bytes(b"half")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_folder_leaves_nothing(tmp_path):
    with atomic_folder(tmp_path / "deep" / "folder") as folder:
        (folder / "a").write_bytes(b"old")
        assert not (tmp_path / "deep" / "folder").exists()
    assert (tmp_path / "deep" / "folder" / "a").read_bytes() == b"old"
    with pytest.raises(InputError, match="other.*free some space"), atomic_folder(tmp_path / "deep" / "other") as folder:
        no_space(open(folder / "a", "wb"))
    with pytest.raises(InputError, match="cannot write to"), atomic_folder(tmp_path / "deep" / "folder"):
        pass  # exists
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["folder"]
    assert (tmp_path / "deep" / "folder" / "a").read_bytes() == b"old"


def test_a_failed_save_of_a_model_leaves_the_old_one(finished, tmp_path, monkeypatch):
    from nvae_fast import NVAE

    model = NVAE.from_pretrained(finished)
    model.save_pretrained(tmp_path / "model")
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    assert before.keys() == {"config.json", "model.safetensors"}
    monkeypatch.setattr("nvae_fast.checkpoint.native.save_file", lambda tensors, path: no_space(open(path, "wb")))
    with torch.no_grad():
        model.prior_ftr0.add_(1)
    with pytest.raises(InputError, match=r"model\.safetensors': No space left on device; free some space"):
        save_model(model, tmp_path / "model")
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before


@pytest.fixture
def small_disk(tmp_path: Path):
    """An empty file system of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # lazy: a failed test may hold a file open


@pytest.mark.parametrize("kib", [0, 8, 60, 150])
def test_full_disk(small_disk, train, finished, same_run, stop_at, kib):
    """Wherever the space runs out, the run ends with one line and goes on when there is some again."""
    run = small_disk / "run"
    stop_at(4)
    assert train(run).code == 143
    stop_at(None)
    status = os.statvfs(small_disk)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(max(status.f_bavail * status.f_frsize - kib * 1024, 0)))
    result = train(run, "--resume", "--images")
    assert result.code == 2 and "Traceback" not in result.err
    assert result.err.splitlines()[-1].startswith(f"nvae-fast: cannot write to '{run}/")
    assert result.err.endswith("': No space left on device; free some space\n")
    filler.unlink()
    assert train(run, "--resume").code == 0
    same_run(run, finished)


@pytest.mark.parametrize("limit", [1000, 1300, 20_000, 40_000])
def test_largest_file_that_the_system_allows(processes, command, tmp_path, finished, same_run, limit):
    run = tmp_path / "run"
    code, err = processes.run(*command(run), file_limit=limit)
    assert code == 2 and "Traceback" not in err and err.endswith("': File too large; choose another place\n"), err
    assert err.count("\n") <= 2  # after the line that says what is trained
    assert processes.run(*command(run, "--resume"))[0] == 0
    same_run(run, finished)


def test_results_on_a_full_disk(processes, finished, exportable, tmp_path):
    for argv in (
        ["convert", exportable, tmp_path / "x.pt"],
        ["sample", finished, "-n", 4, "--out", tmp_path / "x.png"],
        ["evaluate", finished, "--eval_mode", "sample", "--num_samples", 4, "--out", tmp_path],  # .npz
        ["evaluate", finished, "--num_iw_samples", 1, "--out", tmp_path],
    ):
        code, out = processes.run(*argv, file_limit=200)
        *results, err = out.splitlines()
        assert code == 2 and "cannot write to" in err and "File too large" in err, (argv, out)
        assert len(results) == ("--num_iw_samples" in argv) and "written" not in out, out  # its figures are not lost
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--out", "--root"])
def test_a_place_below_a_file(command, cli, tmp_path, images, flag):
    argv = command(tmp_path / "unused")
    place = argv.index("--out")
    argv[place : place + 2] = [flag, images]
    result = cli(*argv) if flag == "--root" else cli(*command(images / "run"))
    assert result.code == 2 and result.err.count("\n") == 1
    assert f"cannot write to '{images}/" in result.err and "Not a directory; choose another place" in result.err


@pytest.mark.parametrize(
    "argv",
    [("sample", "-n", 1, "--out"), ("reconstruct", "--out"), ("evaluate", "--num_iw_samples", 1, "--save"), ("convert",)],
)
def test_results_that_have_no_place(refused, finished, exportable, argv):
    command, *flags = argv
    model = exportable if command == "convert" else finished
    refused("cannot write to '/proc/none")(command, model, *flags, "/proc/none/x.png")


def test_a_folder_in_place_of_a_result(refused, finished, tmp_path):
    refused(f"--out '{tmp_path}' is a folder: give the name of a file, as '{tmp_path / 'x.png'}'")(
        "sample", finished, "-n", 1, "--out", tmp_path
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "part"),
    [("model.safetensors", "is damaged"), ("training.safetensors", "is damaged"), ("config.json", "is not valid JSON"),
     ("training.json", "is not valid JSON")],
)  # fmt: skip
@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "gone"])
def test_damaged_checkpoints(refused, own_copy, latest, command, name, part, damage):
    path = latest(own_copy) / name
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "noise": b"\xff\x00" * 500}[damage])
    expected = () if damage == "gone" else (part,)
    if not (damage == "gone" and name == "model.safetensors"):
        expected += (str(path),)
    refused(*expected)(*command(own_copy, "--resume"))
    refused(*expected)("convert", latest(own_copy), own_copy / "x.pt") if name[0] != "t" else None
    if name in ("model.safetensors", "config.json"):
        refused(*expected)("sample", latest(own_copy), "--out", own_copy / "x.png")


@pytest.mark.parametrize(
    ("old", "new"),
    [('"training": {', '"training": 3, "x": {'), ("[\n  16,\n  16\n ]", '"16"'), ('"channels": 1', '"channels": "one"'),
     ('"channels": 1', '"chanels": 1'), ('"num_x_bits": 8', '"num_x_bits": 9'), ('"channels": 1', '"channels": null')],
)  # fmt: skip
def test_configurations_that_make_no_sense(refused, own_copy, latest, old, new):
    path = latest(own_copy) / "config.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    refused(str(path), "use another checkpoint")("sample", latest(own_copy), "--out", own_copy / "x.png")


@pytest.mark.parametrize(
    ("old", "new"), [('"step": 9', '"stop": 9'), ('"progress": {', '"progress": 3, "x": {'), ('"step": 9', '"step": "nine"')]
)
def test_positions_that_make_no_sense(refused, own_copy, latest, command, old, new):
    path = latest(own_copy) / "training.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    refused("resume from another checkpoint")(*command(own_copy, "--resume"))


@pytest.mark.parametrize("content", ["", "step-00000001\n", "\0\xff", "../../.."])
def test_a_damaged_name_of_the_newest(refused, own_copy, command, content):
    file = own_copy / "checkpoints" / "latest"
    file.write_bytes(content.encode("latin1"))
    before = (own_copy / "metrics.jsonl").read_bytes()
    refused(str(file), "names no checkpoint")(*command(own_copy, "--resume"))
    assert (own_copy / "metrics.jsonl").read_bytes() == before


def test_the_newest_is_no_folder_elsewhere(refused, own_copy, command, latest, tmp_path):
    elsewhere = shutil.copytree(latest(own_copy), tmp_path / "elsewhere" / "step-99999999")
    file = own_copy / "checkpoints" / "latest"
    file.write_text(str(elsewhere))
    refused(str(file), "names no checkpoint")(*command(own_copy, "--resume"))


def test_damaged_lines_of_the_log_are_dropped(train, own_copy, finished, metrics):
    path = own_copy / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'3\n{"step": 4}\n\xff\n{"event": "train", "st')
    assert train(own_copy, "--resume").code == 0  # opens the log, though all is done
    assert metrics(own_copy) == metrics(finished)


def test_places_that_are_no_files(refused, finished, tmp_path):
    refused("cannot use '", "File name too long; choose another path, or free some space")(
        "sample", finished, "--out", tmp_path / ("x" * 300)
    )
    os.mkfifo(tmp_path / "pipe")
    refused("it is a device or a pipe; choose another place")("sample", finished, "-n", 1, "--out", tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_stopped_while_it_imports(cli, monkeypatch):
    class Impatient:
        def find_spec(self, name, *_):
            if name == "nvae_fast.training.signals":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "nvae_fast.training.signals")
    monkeypatch.setattr(sys, "meta_path", [Impatient(), *sys.meta_path])
    assert cli("env") == (130, "", "nvae-fast: stopped by SIGINT\n")


def test_no_room_for_temporary_files(refused, finished, monkeypatch):
    def full(*_, **__):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr("nvae_fast.cli.sample.load_model", full)
    refused("cannot go on: No usable temporary directory found; choose another path, or free some space")("sample", finished)
