"""How the programs log: lines for people, or one JSON object a line for a log collector."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Annotated, Literal

import typer

LogFormat = Literal["text", "json"]
LogFormatOption = Annotated[
    LogFormat, typer.Option(help="Lines for people, or one JSON object a line.")
]


class JsonLines(logging.Formatter):
    """time, level, logger, message; and the traceback of a defect."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def is_news(record: logging.LogRecord) -> bool:
    """Whether what a library says matters here; Flower sets its own level when it is imported."""
    return record.levelno >= logging.WARNING


def start_logging(kind: LogFormat) -> None:
    """Log this project's news, and warnings of what it stands on, to standard error."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JsonLines() if kind == "json" else text)
    handler.addFilter(lambda record: record.name.startswith("consilium") or is_news(record))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("consilium").setLevel(logging.INFO)
