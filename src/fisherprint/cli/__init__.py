"""Command line: one subcommand a stage."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

# Commands are listed in the order in which they are imported.
from fisherprint.cli import experiments, images, trains  # noqa: F401
from fisherprint.cli.shell import app

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line: exit code 0, 2 (wrong call or bad input) or 130 (interrupted)."""
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(args=arguments, prog_name="fisherprint")
    except KeyboardInterrupt:
        _leave_interrupted()
    except SystemExit as leaving:
        # What typer makes of a KeyboardInterrupt.
        if leaving.code != 130:
            raise
        _leave_interrupted()
    except (ValueError, KeyError, OSError, ArithmeticError, ImportError) as error:
        if debug:
            raise
        # A KeyError shows its message as a literal.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        # Imported on demand: it takes a while.
        from pydantic import ValidationError

        if isinstance(error, ValidationError):
            from fisherprint.experiment.schema import explained

            message = explained(error)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def _leave_interrupted() -> NoReturn:
    print("interrupted; finished shards, epochs, rounds and stages are kept", file=sys.stderr)
    # Leave at once: threads of compiled code may still be busy.
    sys.stderr.flush()
    os._exit(130)
