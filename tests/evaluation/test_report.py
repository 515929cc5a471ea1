"""The report: one page that needs nothing else, whatever a run folder holds or lacks."""

from __future__ import annotations

import base64
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
import torch

from nvae_fast.charts import Series, bar_chart, line_chart, number, ticks
from nvae_fast.images import save_grid

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags close, and collects what a page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.links, self.tags, self.text = [], [], set(), []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def run(saved):
    """The folder of a run: 400 lines of training and 4 validations, pictures, scores."""
    lines = []
    for step in range(1, 401):
        loss = None if step == 77 else 1e5 if step == 1 else 300 - step / 4
        lines.append({"event": "train", "step": step, "epoch": step // 100, "loss": loss, "recon": 200.0, "kl": 100.0,
                      "kl_coeff": step / 400, "lr": 1e-3, "spectral": 3.0, "peak_memory": 2**29})  # fmt: skip
        if step % 100 == 0:
            lines.append({"event": "valid", "step": step, "epoch": step // 100 - 1, "nelbo": 290.0 - step / 4, "recon": 150.0,
                          "kl": 50.0, "kl_groups": [3.0, 2.5, 0.0], "active_channels": 4})  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (saved / "metrics.jsonl").write_text(text + '{"event": "train", "st')  # a kill in the middle of a line
    for epoch in (3, 4):
        save_grid(torch.full((2, 1, 4, 4), epoch / 4), saved / f"samples/epoch-000{epoch}-samples.png", 2)
    scores = {"nelbo": 190.2, "neg_log_p": 188.1, "nelbo_bpd": 0.35, "neg_log_p_bpd": 0.34, "nelbo_se": 2.0, "images": 1000,
              "neg_log_p_se": None, "kl_groups": [3.25, 2.5, 0.01], "active_by_group": [3, 1, 0], "num_iw_samples": 10,
              "distances": {"FD-randconv": {"value": 1.23, "temperature": 0.7, "samples": 50}}}  # fmt: skip
    (saved / "evaluation.json").write_text(json.dumps(scores))
    return saved


def svgs(text):
    return [ET.fromstring(part) for part in re.findall(r"<svg.*?</svg>", text, re.S)]


def test_a_page_that_needs_nothing_else(run, cli, tmp_path):
    result = cli("report", run)
    assert result.code == 0 and str(run / "report.html") in result.out
    text = (run / "report.html").read_text()
    page = Page(text)
    assert not page.tags & {"script", "link", "iframe", "object"} and "@import" not in text and "url(" not in text
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    newest = (run / "samples/epoch-0004-samples.png").read_bytes()
    assert base64.b64decode(page.links[0].partition(",")[2]) == newest and len(page.links) == 1
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert len(svgs(text)) == 8  # seven curves (no gradient norms were logged), KL by group
    for words in (
        "190.20 +- 2.00 nats",
        "188.10",
        "FD-randconv",
        "3.25, 3 active",
        "num_latent_per_group",
        "torch",
        "400 steps",
    ):
        assert words in " ".join(page.text), words
    assert "prefers-color-scheme: dark" in text and "FID" not in text
    again = cli("report", run, "--out", tmp_path / "x.html")
    assert again.code == 0 and (tmp_path / "x.html").read_text() == text


@pytest.mark.parametrize("left", ["metrics.jsonl", "config.json", "evaluation.json", None])
def test_what_is_missing_is_left_out(run, cli, refused, left):
    for name in ("metrics.jsonl", "config.json", "evaluation.json"):
        if name != left:
            (run / name).unlink()
    if left is None:
        refused("holds no run")("report", run)
        refused("no run at", "nowhere")("report", run / "nowhere")
        assert not (run / "report.html").exists()
    else:
        assert cli("report", run).code == 0
        Page((run / "report.html").read_text())


def test_hostile_names_stay_text(run, cli):
    config = json.loads((run / "config.json").read_text())
    config["name"] = config["training"]["data"] = '</td><script>alert(1)</script><img src="http://x/y">'
    (run / "config.json").write_text(json.dumps(config))
    scores = json.loads((run / "evaluation.json").read_text())
    del scores["nelbo_bpd"], scores["num_iw_samples"]
    scores["distances"] = {"<script>": {"value": 1.0, "temperature": "<b>"}, "bad": {"value": "x"}, "worse": 3}
    (run / "evaluation.json").write_text(json.dumps(scores))
    (run / "samples/epoch-0009-samples.png").write_bytes(b"GIF89a")
    assert cli("report", run).code == 0
    page = Page((run / "report.html").read_text())
    assert "script" not in page.tags and "b" in page.tags  # the <b> of the figures
    assert not any("http" in link for link in page.links) and "</td><script>alert(1)" in "".join(page.text)


def points(svg, kind):
    lines = svg.findall(f".//{{*}}polyline[@class='{kind}']")
    return [[tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in lines]


def test_lines_are_where_their_numbers_are():
    series = [Series("a", [(0, 0.0), (50, 10.0), (100, 5.0)]), Series("b", [(0, 5.0), (100, 5.0)], dots=True)]
    (svg,) = svgs(line_chart(series, "step", "nats"))
    ((first, middle, last),) = points(svg, "series-1")
    (flat,) = points(svg, "series-2")
    assert first[0] < middle[0] < last[0] and middle[0] - first[0] == pytest.approx(last[0] - middle[0])
    assert middle[1] < last[1] < first[1] and last[1] == flat[1][1] == pytest.approx((first[1] + middle[1]) / 2, abs=0.1)
    assert len(svg.findall(".//{*}circle[@class='dot-2']")) == 2 and not svg.findall(".//{*}circle[@class='dot-1']")
    assert {"a", "b", "step", "10"} <= {t.text for t in svg.findall(".//{*}text")}
    grid = {float(line.get("y1")) for line in svg.findall(".//{*}line[@class='grid']")}
    assert flat[0][1] in grid  # five is a tick


def test_gaps_and_starts_far_off():
    values = [(x, math.nan if x in (40, 41) else None if x == 70 else 10.0) for x in range(100)]
    (svg,) = svgs(line_chart([Series("a", values)], "step", "nats"))
    assert [len(run) for run in points(svg, "series-1")] == [40, 28, 29]
    falling = [(x, 1e6 if x == 0 else 20.0 - x / 10) for x in range(100)]
    (svg,) = svgs(line_chart([Series("a", falling)], "step", "nats"))
    (run,) = points(svg, "series-1")
    assert len(run) == 100 and run[0][1] == min(y for _, y in run) and run[-1][1] - run[1][1] > 150  # the rest is not flat
    assert line_chart([Series("a", [(1, None), (2, math.inf)])], "step", "nats") == "" == line_chart([], "step", "nats")
    assert len(svgs(line_chart([Series("a", [(3, 0.0)])], "step", "nats"))) == 1  # a single point


def test_long_runs_stay_small():
    long = [(x, float(x % 2)) for x in range(100_000)]
    text = line_chart([Series("a", long)], "step", "nats")
    assert len(text) < 10_000 and len(points(svgs(text)[0], "series-1")[0]) == 300


def test_names_are_text():
    (svg,) = svgs(line_chart([Series("a<b", [(0, 1.0), (1, 2.0)], dots=True), Series("&", [(0, 1.0)])], 'x"<', "<y>"))
    assert {"a<b", "&", 'x"<'} <= {t.text for t in svg.findall(".//{*}text")}
    assert "a<b: 2 at" in svg.findall(".//{*}title")[1].text and svg.get("aria-label").startswith("<y> by")


def test_bars_start_at_zero():
    (svg,) = svgs(bar_chart([("group 0", 4.0, "4.00"), ("group 1", 1.0, "1.00"), ("group 2", 0.0, "0.00")], "KL"))
    widths = [float(bar.get("width")) for bar in svg.findall(".//{*}rect")]
    assert widths[0] == pytest.approx(4 * widths[1], abs=0.3) and widths[2] < 1
    assert bar_chart([("a", math.nan, "")], "KL") == ""


@pytest.mark.parametrize(
    "low, high, expected", [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (3, 17, [5, 10, 15]), (-1, 1, None), (2, 2, [2])]
)
def test_round_ticks(low, high, expected):
    found = ticks(low, high)
    if expected is not None:
        assert found == pytest.approx(expected)
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in found)


def test_numbers_of_axes():
    shown = [number(v) for v in (0, 12000, 0.05, 0.0001, 2.5e-5, 3e6, -7, 999.5)]
    assert shown == ["0", "12,000", "0.05", "1e-4", "2.5e-5", "3e6", "-7", "999.5"]
