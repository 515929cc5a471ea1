"""Write a run as one HTML file: curves, KL by group, pictures, scores, configuration."""

from __future__ import annotations

import argparse

from nvae_fast.cli.flags import check_file

NAME = "report"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="run folder")
    parser.add_argument("--out", help="file to write [report.html in the run folder]")


def run(args: argparse.Namespace) -> None:
    from nvae_fast.report import write_report

    check_file("--out", args.out, ".html")
    print(f"report: {write_report(args.run, args.out)}")
