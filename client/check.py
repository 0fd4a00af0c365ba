"""Preflight: everything a deployment needs of this machine, every fault in one line.

Nothing stops at the first fault. Lines name rules, files and counts, never a patient's value.
"""

from __future__ import annotations

import shutil
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from client.certificate_check import check_certificate, check_own_list
from client.config import Data, SiteConfig, check_key_mode
from client.connection_check import check_connection
from client.data_card import write_card
from client.data_check import check_data
from client.deidentify import deidentify
from client.finding import Finding, fault, has_fault, ok, warning
from client.link_check import check_link
from client.site import pick_device
from client.study_check import check_budget, check_terms, planned_study
from common.errors import ConfigError, DataError
from common.models.build import build_network
from common.models.flat import Schema
from common.study import Study
from common.traffic import BYTES_PER_PARAM

LEAST_FREE_BYTES = 1 << 30
MODELS_KEPT = 4  # an upload, the one before it, a copy while it is written, the journal


def _utc_now() -> datetime:
    return datetime.now(UTC)


def check(
    config: SiteConfig,
    study_file: Path | None = None,
    *,
    offline: bool = False,
    deidentified: Path | None = None,
    now: Callable[[], datetime] = _utc_now,
) -> Iterator[Finding]:
    """Go through everything that taking part needs, line by line.

    Args:
      config: The site file, which was found valid.
      study_file: The study to hold the site against; else the newest approved one, if any.
      offline: Leave the coordinator out.
      deidentified: Where to write a copy of the data without what names a person; None for none.
      now: This machine's clock, with a time zone.

    Returns:
      Findings in a fixed order; a fault carries the exit code of its error class.
    """
    yield ok(f"site file: every key of {config.name} is valid")
    study, told = planned_study(config, study_file)
    yield from told
    schema = build_network(study).schema if study else None
    yield from _check_state_dir(config.state_dir, schema)
    yield from _check_consortium(config, study, schema, offline=offline, now=now())
    if study is not None:
        yield from check_terms(config, study)
    yield from _check_data(config, study, now())
    if deidentified is not None:
        yield _copy(config.data, deidentified)
    if study is not None:
        yield from check_budget(config, study)
    yield _check_device(config.device)


def _check_data(config: SiteConfig, study: Study | None, now: datetime) -> Iterator[Finding]:
    """What the data are, line by line, and the card that keeps it."""
    found = []
    for finding in check_data(config, study):
        found.append(finding)
        yield finding
    try:
        yield ok(f"data card: {write_card(config, study, found, now)}; it stays here")
    except OSError as error:
        yield warning(f"data card: not written to {config.state_dir} ({error.strerror})")


def _copy(data: Data, folder: Path) -> Finding:
    try:
        copied = deidentify(data, folder)
    except (ConfigError, DataError) as error:
        return fault(error)
    except OSError as error:
        text = f"{folder}: {error.strerror}; give a folder that can be written"
        return fault(ConfigError(text))
    left_out = f"; {copied.left_out} left out: writing is burned in" if copied.left_out else ""
    return ok(f"de-identified copy: {copied.files} files in {folder}{left_out}; look at a few")


def _check_consortium(
    config: SiteConfig,
    study: Study | None,
    schema: Schema | None,
    *,
    offline: bool,
    now: datetime,
) -> Iterator[Finding]:
    """The key, the certificate, the coordinator, and the link to it."""
    if config.coordinator is None and config.certificates is None:
        yield warning(
            "coordinator, [certificates]: not in the site file; this site can simulate and not "
            "take part; see certs/README.md"
        )
        return
    if config.coordinator is None or config.certificates is None:
        missing = "coordinator" if config.coordinator is None else "[certificates]"
        yield fault(ConfigError(f"{missing}: not in the site file; taking part needs both"))
        return
    yield from _check_key_mode(config.certificates.key)
    own = list(check_certificate(config, config.certificates, now))
    yield from own
    yield from check_own_list(config.certificates, now)
    if offline:
        yield warning(f"coordinator {config.coordinator}: not called, as --offline says")
        return
    called = list(check_connection(config, study, may_identify=not has_fault(own)))
    yield from called
    if study is not None and schema is not None and not has_fault([*own, *called]):
        yield from check_link(config, study, schema)


def _check_state_dir(folder: Path, schema: Schema | None) -> Iterator[Finding]:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        yield fault(ConfigError(f"state_dir {folder}: {error.strerror}; choose a writable one"))
        return
    yield ok(f"state folder {folder}: writable")
    try:
        yield _check_space(folder, BYTES_PER_PARAM * schema.num_params if schema else 0)
    except ConfigError as error:
        yield fault(error)


def _check_space(folder: Path, model_bytes: int) -> Finding:
    free, needed = shutil.disk_usage(folder).free, max(LEAST_FREE_BYTES, MODELS_KEPT * model_bytes)
    said = f"disk of {folder}: {_in_gib(free)} free, {_in_gib(needed)} needed"
    if free < needed:
        return fault(ConfigError(f"{said}; delete what is not needed, or move state_dir"))
    return ok(said)


def _check_key_mode(key: Path) -> Iterator[Finding]:
    try:
        check_key_mode(key)
    except ConfigError as error:
        yield fault(error)
    else:
        if key.exists():  # else the certificate's check says that it cannot be read
            yield ok(f"key {key}: mode {stat.S_IMODE(key.stat().st_mode):04o}")


def _check_device(name: str) -> Finding:
    try:
        return ok(f"device: {pick_device(name).type}")
    except ConfigError as error:
        return fault(error)


def _in_gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"
