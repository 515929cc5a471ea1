"""The README's tables of measurements, made from results: `python -m nvae_fast.benchmarks.readme RESULTS.json ...` prints them,
and with `--write README.md` puts them between its two comments. Without files: the newest ones that git knows (`make readme`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nvae_fast.checkpoint.files import atomic_write, writing
from nvae_fast.errors import InputError

Document = dict[str, Any]

RESULTS = Path(__file__).resolve().parent / "results"
BEGIN = "<!-- measured: begin (make readme) -->"
END = "<!-- measured: end -->"
NO_GPU = "Not yet measured on a GPU."
PHASES = ("step", "sample", "fwd_bwd")
LABELS = {
    "train_step": "training step, `{case}`, batch {batch}",
    "sample": "sampling, `{case}`",
    "inverted_residual": "decoder cell branch {shape}",
    "preact_branch": "encoder cell branch {shape}",
    "cell": "decoder cell {shape}",
    "bn_swish_depthwise": "BN + Swish + depthwise 5x5 {shape}",
    "power_iteration": "`power_iteration`, 4 rounds of {count} matrices",
    "weight_norm": "`weight_norm` of {count} weights",
    "adamax": "Adamax, {count} tensors",
}
RIVALS = {"eager_channels_last": "channels-last eager", "eager": "NCHW eager", "compile": "torch.compile"}
OTHERS = {
    "eager_loop": "loop over matrices",
    "around_cudnn": "ours around cuDNN",
    "adam_fused": "torch's fused Adam",
    "nvlabs": "NVlabs/NVAE",
    "ours:graph": "ours as one graph",
    "eager_graph": "eager as one graph",
}


def block(documents: Sequence[Document]) -> str:
    """Markdown: a table for each device, the CPU last, and a line where no GPU is among them."""
    parts = []
    for device in sorted({d["device"] for d in documents}, key=lambda name: (name == "cpu", name)):
        own = [d for d in documents if d["device"] == device]
        rows = [row for d in own for row in d["rows"]]
        parts += [f"{place(own[0])}\n", "\n".join(times(rows)), "\n".join(memory(rows))]
    if all(d["device"] == "cpu" for d in documents):
        parts.append(NO_GPU)
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def place(document: Document) -> str:
    """Where and when, in a sentence."""
    machine = f"{document['cpu']}, {document['threads']} threads" if document["device"] == "cpu" else document["device"]
    commit = (document["commit"] or "unknown")[:9]
    return (
        f"{machine}, torch {document['torch']}, {document['date'][:10]}, commit {commit}: medians of interleaved rounds in one "
        "run, rivals as multiples of ours, the best round of ours in brackets; every figure's numbers were checked against "
        "float64 first."
    )


def times(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """A line for each case with a step, a sampling, or forward and backward."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["phase"] in PHASES and row["median_ms"] is not None:
            groups.setdefault((PHASES.index(row["phase"]), row["case"]), []).append(row)
    if not groups:
        return
    yield f"| | ours, ms | images/s | {' | '.join(RIVALS.values())} | other | memory, of channels-last eager |"
    yield "|" + "---|" * (len(RIVALS) + 5)
    for (phase, _), own in sorted(groups.items(), key=lambda item: item[0][0]):  # in the order of the rows otherwise
        ours, by_name = own[0], {row["impl"]: row for row in own}
        rate = f"{ours['images_per_s']:.4g}" if PHASES[phase] != "fwd_bwd" and ours["images_per_s"] else ""
        time = f"{ours['median_ms']:.3g} ({ours['min_ms']:.3g})" if ours["check"]["ok"] else "numbers not ok"
        others = ", ".join(f"{words} {ratio(ours, by_name[name])}" for name, words in OTHERS.items() if name in by_name)
        cells = [label(ours), time, rate, *(ratio(ours, by_name.get(name)) for name in RIVALS), others]
        yield "| " + " | ".join([*cells, share(ours, by_name.get("eager_channels_last"))]) + " |"


def memory(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """A line for each contender of the suite memory, at its smaller batch."""
    own = [row for row in rows if row["suite"] == "memory"]
    if not own:
        return
    yield "| a training step's memory | batch | MiB | MiB an image more | largest batch within | |"
    yield "|---|---|---|---|---|---|"
    for case in dict.fromkeys(row["case"] for row in own):
        for name in dict.fromkeys(row["impl"] for row in own if row["case"] == case):
            row = next(r for r in own if (r["case"], r["impl"]) == (case, name))
            fits = f"{row['budget_bytes'] / 2**30:.3g} GiB: {row['largest_batch']}"
            peak, more = (f"{row[key] / 2**20:.1f}" for key in ("peak_bytes", "per_image_bytes"))
            how = "traced" if row["traced"] else "measured" if row["check"]["ok"] else "numbers not ok"
            yield f"| `{case.removeprefix('memory/')}`, {name} | {row['shape'][0]} | {peak} | {more} | {fits} | {how} |"


def label(row: dict[str, Any]) -> str:
    words = LABELS.get(row["op"], f"`{row['op']}` {{shape}}")
    case = row["case"].removeprefix("sample/").removesuffix(f"/{row['dtype']}")
    text = words.format(case=case, batch=row["shape"][0], count=row["shape"][0], shape=row["shape"])
    return text if row["dtype"] == "float32" else f"{text}, {row['dtype']}"


def ratio(ours: dict[str, Any], row: dict[str, Any] | None) -> str:
    """How many times as long as ours; nothing where the numbers of either are wrong."""
    if row is None or not (ours["check"]["ok"] and row["check"]["ok"]):
        return ""
    return f"{row['median_ms'] / ours['median_ms']:.1f}x"


def share(ours: dict[str, Any], row: dict[str, Any] | None) -> str:
    if row is None or not row["peak_bytes"] or ours["peak_bytes"] is None:
        return ""
    return f"{ours['peak_bytes'] / row['peak_bytes']:.2f}"


def newest(folder: Path = RESULTS) -> list[Document]:
    """Of each device, the results of the commit that was measured last; of files that git knows, where it does know any."""
    files = sorted(folder.glob("*/*.json"))
    command = ["git", "-C", str(folder), "ls-files", "--", "*.json"]
    try:
        known = {folder / name for name in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()}
        files = [file for file in files if file in known] if known else files
    except (OSError, subprocess.CalledProcessError):
        pass
    documents = read(files)
    last = {d["device"]: d["commit"] for d in sorted(documents, key=lambda d: d["date"])}
    return [d for d in documents if d["commit"] == last[d["device"]]]


def read(files: Iterable[Path]) -> list[Document]:
    """Results; InputError for a file that holds none."""
    documents = []
    for file in files:
        try:
            document = json.loads(file.read_text())
            if not {"device", "commit", "date", "rows"} <= document.keys():
                raise ValueError
        except (OSError, ValueError, AttributeError):
            raise InputError(f"'{file}' holds no results of `nvae-fast bench --json`") from None
        documents.append(document)
    return documents


def inserted(text: str, new: str) -> str:
    """`text` with `new` between its comments; InputError where it lacks them."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise InputError(f"expected the lines '{BEGIN}' and '{END}' once each, in this order")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{new}{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nvae_fast.benchmarks.readme", description=__doc__)
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULTS.json")
    parser.add_argument("--write", type=Path, metavar="README.md", help="put the tables into this file")
    args = parser.parse_args(argv)
    try:
        text = block(read(args.results) if args.results else newest())
        if args.write is None:
            print(text, end="")
        else:
            with writing(args.write):
                old = args.write.read_text()
            new = inserted(old, text).encode()
            atomic_write(args.write, lambda file: file.write(new))
    except InputError as error:
        print(f"readme: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
