"""How every command of this project starts and ends: errors become one message and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer

from common.errors import FederationError


def start(command: Callable[..., Any] | typer.Typer) -> None:
    """Run a command line and exit.

    A ``FederationError`` is printed to stderr without a traceback, and its exit code returned.
    """
    app = command
    if not isinstance(app, typer.Typer):
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(command)
    try:
        app()
    except FederationError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
