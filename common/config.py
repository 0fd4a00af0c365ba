"""Read a TOML file into a frozen model and report every problem at once.

Values are checked strictly (a number in quotes is not a number) and never echoed: a configuration
may hold what should not appear in a log.
"""

from __future__ import annotations

import copy
import difflib
import functools
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo

from common.errors import ConfigError, RemoteProtocolError


class Frozen(BaseModel):
    """Base of every configuration: immutable, strict, no unknown keys, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield (key, sentence) for values that are right alone and wrong together."""
        yield from ()


Model = TypeVar("Model", bound=Frozen)
MAX_KEYS_NAMED, MAX_KEY_CHARS = 10, 100  # of what a peer sent, in a message about it


def _check_printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("a character does not print; use letters, digits, signs and spaces")
    return text


PrintableText = Annotated[str, AfterValidator(_check_printable)]
"""Text that people read on a screen before they approve it: nothing that could steer a terminal."""


def _from_file(value: Path, info: ValidationInfo) -> Path:
    base = (info.context or {}).get("base")
    try:
        return (Path(base) / value.expanduser()).resolve() if base else value
    except RuntimeError as error:
        raise ValueError(str(error)) from None


RelativePath = Annotated[Path, AfterValidator(_from_file)]
"""A path; a relative one is relative to the file it stands in."""


def load(path: Path, kind: type[Model], overrides: Mapping[str, Any] | None = None) -> Model:
    """Read ``path`` as ``kind``.

    Args:
      path: A TOML file. Relative paths inside it are relative to its folder.
      kind: The model to build.
      overrides: Values by dotted key (``privacy.epsilon``) that replace the file's.

    Returns:
      The frozen, validated model.

    Raises:
      ConfigError: The file cannot be read, is not TOML, or does not fit ``kind``; the message lists
        every problem with the path of its key.
    """
    table = read_table(path)
    for key, value in (overrides or {}).items():
        replace_value(table, key, value)
    return validate(table, kind, source=path)


def read_table(path: Path) -> dict[str, Any]:
    """Read a TOML file into a plain dictionary."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; check the path") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text at byte {error.start}") from None
    except (tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def validate(table: Mapping[str, Any], kind: type[Model], *, source: Path) -> Model:
    """Build ``kind`` from a parsed table; ``source`` names the file in messages."""
    found: dict[str, str] = {}
    rest = copy.deepcopy(dict(table))
    while True:
        try:
            model = _build(rest, kind, source)
        except ValidationError as error:
            # What was taken out is missing now: only the first reading tells what really is.
            again = bool(found)
            new = _joined(_problems(error, rest, kind, skip_missing=again))
            new = {key: text for key, text in new.items() if not _about(key, found)}
        else:
            new = _joined(_conflicts(model))
            new = {key: text for key, text in new.items() if not _about(key, found)}
            if not found and not new:
                return model
        # What is wrong is taken out and the rest read again: a wrong type in one key must not hide
        # an impossible combination elsewhere.
        found |= new
        removed = [_remove(rest, key) for key in new]
        if not any(removed):
            raise ConfigError(_sentence(source, found))


def _joined(problems: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Sentences by key; two about one key stand behind each other."""
    joined: dict[str, str] = {}
    for key, text in problems:
        joined[key] = f"{joined[key]}; {text}" if key in joined else text
    return joined


def _about(key: str, found: Iterable[str]) -> bool:
    """Whether a key was complained about, or is the section of one that was."""
    return any(known == key or known.startswith(f"{key}.") for known in found)


def _build(table: Mapping[str, Any], kind: type[Model], source: Path) -> Model:
    # Through JSON: pydantic's strict mode then takes lists for tuples and text for paths.
    return kind.model_validate_json(
        json.dumps(table, default=_no_text), context={"base": source.absolute().parent}
    )


def _no_text(value: object) -> dict[str, str]:
    """TOML dates have no JSON form; a table fits no key that wants text or a number."""
    return {"unexpected": type(value).__name__}


def _remove(table: dict[str, Any], dotted: str) -> bool:
    """Take one key out of a nested table; False when it is not there (a missing key)."""
    *sections, last = dotted.split(".")
    here: Any = table
    for section in sections:
        here = here.get(section) if isinstance(here, dict) else None
    return isinstance(here, dict) and here.pop(last, None) is not None


def parse_message(text: str, kind: type[Model], *, what: str, rule: str = "") -> Model:
    """Build ``kind`` from JSON that came over the wire; ``rule`` is broken if that fails.

    Read once, and nothing is suggested: a stranger must not decide how long that takes.

    Raises:
      RemoteProtocolError: It is not one of this version; the message names the keys, no values.
    """
    try:
        model = kind.model_validate_json(text)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise _foreign([".".join(map(str, one["loc"])) for one in found], what, rule) from None
    except RecursionError:
        raise RemoteProtocolError(f"not a {what}: nested too deeply", rule=rule) from None
    if wrong := [key for key, _ in _conflicts(model)]:
        raise _foreign(wrong, what, rule)
    return model


def _foreign(keys: Sequence[str], what: str, rule: str) -> RemoteProtocolError:
    """A peer chose the keys: a few of them, and no character that does not print."""
    more = f" and {len(keys) - MAX_KEYS_NAMED} more" if len(keys) > MAX_KEYS_NAMED else ""
    named = printable(", ".join(key[:MAX_KEY_CHARS] for key in keys[:MAX_KEYS_NAMED]))
    return RemoteProtocolError(f"not a {what} of this version: {named}{more}", rule=rule)


def printable(text: str) -> str:
    """The same with ``?`` for what does not print."""
    return "".join(char if char.isprintable() else "?" for char in text)


def parse_assignment(text: str) -> tuple[str, Any]:
    """Split ``key=value`` of the command line; the value is TOML, else a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text}: expected key=value, for example num_rounds=3")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value


def replace_value(table: dict[str, Any], dotted: str, value: Any) -> None:
    """Set one value of a parsed file by its dotted key."""
    *sections, last = dotted.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {dotted}: {section} is a value, not a table")
    table[last] = value


def _sentence(source: Path, problems: Mapping[str, str]) -> str:
    lines = [f"{source.name} has {len(problems)} problem(s):"]
    lines += [f"  {key}: {text}" for key, text in problems.items()]
    return "\n".join(lines)


def _conflicts(model: Frozen, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, text in model.conflicts():
        yield prefix + key, text
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, Frozen):
            yield from _conflicts(value, f"{prefix}{name}.")


def _problems(
    error: ValidationError, table: Mapping[str, Any], kind: type[Frozen], *, skip_missing: bool
) -> Iterator[tuple[str, str]]:
    problems = error.errors(include_url=False, include_input=False)
    places = [problem["loc"] for problem in problems]
    for problem in problems:
        here = problem["loc"]
        if problem["type"] == "too_short" and any(
            place[: len(here)] == here and place != here for place in places
        ):
            continue  # too short only because a wrong item was left out
        if skip_missing and problem["type"] in ("missing", "union_tag_not_found"):
            continue
        keys = _keys(problem["loc"], table, is_missing=problem["type"] == "missing")
        text = problem["msg"]
        context = problem.get("ctx", {})
        if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
            keys.append(str(context["discriminator"]).strip("'"))
            text = (
                f"Input should be {context['expected_tags']}"
                if "expected_tags" in context
                else ("Field required")
            )
        elif problem["type"] == "extra_forbidden":
            text += _suggestion(keys[-1], kind)
        yield ".".join(keys), text.removeprefix("Value error, ")


def _keys(
    location: Sequence[str | int], table: Mapping[str, Any], *, is_missing: bool
) -> list[str]:
    """The path as the file has it: pydantic also names the member of a union, the file does not."""
    keys: list[str] = []
    here: Any = table
    for position, step in enumerate(location):
        known = isinstance(here, Mapping) and step in here
        inside = isinstance(here, list) and isinstance(step, int)
        if known or inside:
            here = here[step]
        elif position < len(location) - 1 or not is_missing:
            continue
        keys.append(str(step))
    return keys


def _suggestion(key: str, kind: type[Frozen]) -> str:
    close = difflib.get_close_matches(key, _all_keys(kind) - {key}, n=1, cutoff=0.75)
    return f"; did you mean {close[0]!r}?" if close else ""


@functools.cache
def _all_keys(kind: type[Frozen]) -> frozenset[str]:
    schema = kind.model_json_schema()
    parts = [schema, *schema.get("$defs", {}).values()]
    return frozenset(key for part in parts for key in part.get("properties", {}))
