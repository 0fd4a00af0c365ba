"""``fl-client``: a hospital's command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from client.config import SiteConfig
from common.cli import start
from common.config import load
from common.errors import ConfigError
from common.study import Study

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback(invoke_without_command=True)
def site(
    context: typer.Context,
    site_config: Annotated[Path, typer.Option(help="The site's TOML file.")],
) -> None:
    """Run a hospital's side of a study. Without a command: take part."""
    context.obj = load(site_config, SiteConfig)
    if context.invoked_subcommand is None:
        raise ConfigError(
            "taking part over a network is not built yet; this version simulates: scripts/simulate"
        )


@app.command()
def check(
    context: typer.Context,
    study: Annotated[Path | None, typer.Option(help="Also hold the data against a study.")] = None,
) -> None:
    """Check the site file and read every image once; exit 3 names what cannot be used."""
    planned = load(study, Study) if study else None
    from client.check import check as lines

    for line in lines(context.obj, planned):
        print(line, flush=True)


def main() -> None:
    """Entry point of ``fl-client``."""
    start(app)
