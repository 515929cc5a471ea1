"""The command line: `nvae-fast COMMAND`; COMMANDS lists them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from nvae_fast._version import __version__
from nvae_fast.cli import (
    bench,
    convert,
    decode,
    doctor,
    encode,
    env,
    estimate,
    evaluate,
    interpolate,
    prepare,
    reconstruct,
    report,
    sample,
    train,
    traverse,
)
from nvae_fast.cli.flags import Parser, check_not_empty, underscored
from nvae_fast.errors import InputError, RunError, out_of_memory

MODULES = (  # in the order of --help
    train,
    evaluate,
    sample,
    reconstruct,
    interpolate,
    traverse,
    encode,
    decode,
    report,
    prepare,
    convert,
    estimate,
    doctor,
    bench,
    env,
)
COMMANDS = {module.NAME: module for module in MODULES}


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; each module of COMMANDS brings its flags (`add_flags`) and its action (`run`)."""
    parser = Parser(
        prog="nvae-fast", description="Train, evaluate and sample NVAEs. Dashes and underscores in flags are equal."
    )
    parser.add_argument("--version", action="version", version=f"nvae_fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        doc = module.__doc__.strip()
        sub = commands.add_parser(name, help=doc.splitlines()[0], description=doc,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
        module.add_flags(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Exit codes: 0 done, 1 the run failed, 2 bad usage or input, 130 or 143 stopped with its state saved."""
    try:
        from nvae_fast.training.signals import Interrupted  # seconds, in which a user may think better of it

        argv = underscored(sys.argv[1:] if argv is None else argv)
        args = build_parser().parse_args(argv, argparse.Namespace(argv=argv))
        check_not_empty(args)
        with out_of_memory():
            return COMMANDS[args.command].run(args) or 0
    except InputError as error:
        return _fail(error, 2)
    except RunError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("stopped by SIGINT", 130)
    except OSError as error:  # what asking about a path raises: a name that is too long, a folder that may not be entered
        if error.strerror is None:
            raise
        what = "go on" if error.filename is None else f"use '{str(error.filename)[:200]}'"
        return _fail(f"cannot {what}: {error.strerror}; choose another path, or free some space", 2)
    except Interrupted as stop:
        return _fail(f"{stop}; state saved, continue with --resume auto", stop.exit_code)


def _fail(message: object, code: int) -> int:
    print("nvae-fast:", str(message).replace("\n", " "), file=sys.stderr)
    return code
