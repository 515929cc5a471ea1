"""Versions, devices, and which implementation every op takes here, and why."""

from __future__ import annotations

import argparse

NAME = "env"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """No flags."""


def run(args: argparse.Namespace) -> None:
    from nvae_fast.env import main

    main()
