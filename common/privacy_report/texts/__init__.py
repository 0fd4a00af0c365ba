"""The words of the privacy report: one TOML file for each language."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, cast

LANGUAGES = tuple(sorted(path.stem for path in Path(__file__).parent.glob("*.toml")))


class Texts:
    """Every sentence of one language, by section and name."""

    def __init__(self, language: str = "en") -> None:
        path = Path(__file__).parent / f"{language}.toml"
        self._table = tomllib.loads(path.read_text(encoding="utf-8"))

    @property
    def language(self) -> str:
        """Its code, as HTML wants it."""
        return cast("str", self._table["language"])

    def __call__(self, name: str, /, **values: object) -> str:
        """A sentence; ``name`` is ``section.key``, ``values`` fill its braces."""
        return cast("str", self._found(name)).format(**values)

    def lines(self, name: str) -> list[str]:
        """A list of sentences."""
        return cast("list[str]", self._found(name))

    def _found(self, name: str) -> Any:
        section, key = name.split(".")
        return self._table[section][key]
