"""A site of a consortium that never ran, its books, and the commands that read them."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

import tomli_w
from deployment import Consortium, found
from site_books import Books
from typer.testing import CliRunner

from client.cli import app
from common.config import load
from common.identity import Identity
from common.study import Study

NAMES = ("north", "south", "west")
SITE = "north"
STUDY = {
    "name": "chests",
    "num_rounds": 4,
    "task": {"kind": "classification", "labels": "binary", "classes": ["no lesion", "lesion"]},
    "model": {"name": "cnn", "width": 4, "activation": "tanh"},
    "input": {"size": [32, 32], "channels": 1, "intensity": "image"},
    "training": {"learning_rate": 1.0, "batch_size": 8, "local_steps": 4},
    "privacy": {
        "unit": "patient",
        "noise_multiplier": 1.5,
        "delta": 1e-3,
        "example_clip_norm": 0.5,
    },
}
DATA = {"name": "xrays", "format": "phantom", "num_patients": 24, "declared_patients": 20}
BUDGET = {"epsilon": 8.0, "delta": 1e-3}


@dataclass
class Looked:
    """A site of a consortium, and its commands."""

    consortium: Consortium
    books: Books

    @property
    def home(self) -> Path:
        return self.books.home

    def run(self, *command: str) -> list[str]:
        """Lines of a command that succeeds.

        Raises:
          FederationError: It does not: as the command line catches it.
        """
        ended = CliRunner().invoke(app, ["--site-config", str(self.file), *command])
        if ended.exception is not None:
            raise ended.exception
        return ended.stdout.splitlines()

    @property
    def file(self) -> Path:
        return self.consortium.site(SITE)


def look_at(tmp_path: Path) -> Looked:
    """A consortium in a folder, and its first site, with empty books and a budget."""
    planned = tmp_path / "planned.toml"
    planned.write_text(tomli_w.dumps(STUDY))
    consortium = found(tmp_path, planned, NAMES, data=DATA)
    file = consortium.site(SITE)
    file.write_text(tomli_w.dumps(tomllib.loads(file.read_text()) | {"budget": BUDGET}))
    identity = Identity.load(file.parent / "certificate.pem", file.parent / "key.pem")
    study = load(consortium.study, Study)
    return Looked(consortium, Books(file.parent / "state", study, identity, "xrays", 20))
