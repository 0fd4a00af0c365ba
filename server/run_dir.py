"""The run folder: the door where the model and the record of a run reach the disk.

Every file is written beside its place, flushed, and renamed into it. ``state.safetensors`` is
written last in a round: it is what a resumed run continues from, and whatever was written after it
is written again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

from common.config import load
from common.disk import hold_lock, remove_leftovers, replace_file, replacing
from common.errors import ConfigError
from common.evidence import FILE as EVIDENCE
from common.identity import Identity
from common.manifest import Manifest
from common.messages import Agreement, Message, Roster
from common.models.flat import Schema
from common.record import as_table, from_table
from common.seal import SUMS, digest_of, seal
from common.simulation import SIMULATION, STUDY, Simulation
from common.statement import Statement
from common.study import Study
from common.tasks import Figures
from common.throwaway import CA, SITES
from server.collected import Collected
from server.epoch import Epoch
from server.state import State
from server.tensor_file import read_tensors, write_tensors
from server.transcript import TRANSCRIPT

STATE = "state.safetensors"
PENDING = "pending-sum.safetensors"
EXCLUDED = "excluded.json"
OPENED = "opened-epoch"
ROUNDS = "rounds.jsonl"
EVALUATIONS = "evaluations.jsonl"
STATISTICS = "statistics"  # counts and figures of what the images are like
PRIVACY = "privacy"
SUMMARY = "summary.json"
FINAL = "final.safetensors"
AUDIT = "audit.jsonl"
LOCK = ".lock"
REPORTS = ("report", "privacy-report", "attacks")  # made of a finished run: no part of it
SUPERLINK = ".superlink"  # what Flower's process writes; gone at the end of a run


class RunDir:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(
        cls, path: Path, study: Study, simulation: Simulation | None = None, *, resume: bool
    ) -> RunDir:
        """Start a new run folder, or continue one.

        Raises:
          ConfigError: The folder is in use and ``resume`` was not asked for; or it holds another
            study, or the same one over other data.
        """
        run_dir = cls(path)
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file; a run needs a folder")
        if not path.exists() or not any(path.iterdir()) or _never_began(path):
            if resume:
                raise ConfigError(f"{path} holds no run to resume; leave out --resume to start one")
            run_dir._create(study, simulation)
            return run_dir
        if not resume:
            raise ConfigError(f"{path} is not empty; use --resume, or another --run-dir")
        if not (path / STUDY).exists():
            raise ConfigError(f"{path} is not empty and holds no run to resume")
        run_dir._lock()
        remove_leftovers(path)  # each may be as large as a model
        if run_dir.study().digest() != study.digest():
            raise ConfigError(f"{path} holds a run of another study; resume it with that study")
        if simulation is not None and run_dir.simulation() != simulation:
            raise ConfigError(f"{path} holds a run over other data; resume it with the same data")
        return run_dir

    def _create(self, study: Study, simulation: Simulation | None) -> None:
        for folder in (self.path, self.path / "models", self.path / "counts"):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        if simulation is not None:
            self._write(SIMULATION, tomli_w.dumps(simulation.model_dump(mode="json")).encode())
        self._write(STUDY, tomli_w.dumps(study.as_table()).encode())

    def _lock(self) -> None:
        """Keep a second process out of this run for as long as this object lives."""
        if not hold_lock(self.path / LOCK, self):
            raise ConfigError(f"{self.path}: another process works on this run")

    def study(self) -> Study:
        """The study of this run; its digest is the run's."""
        return load(self.path / STUDY, Study)

    def simulation(self) -> Simulation:
        """Where the simulated sites of this run have their data."""
        return load(self.path / SIMULATION, Simulation)

    @property
    def is_simulation(self) -> bool:
        """Whether the sites of this run were simulated."""
        return (self.path / SIMULATION).exists()

    # Epochs and state

    def save_epoch(self, epoch: Epoch) -> None:
        """Keep what the members agreed to, and their public keys."""
        number = epoch.manifest.epoch
        messages: list[Message] = [epoch.roster, *epoch.agreements]
        tables = [as_table(message) for message in messages]
        self._write(f"keys-{number}.json", (json.dumps(tables, indent=1) + "\n").encode())
        self._write(f"epoch-{number}.json", epoch.manifest.canonical().encode())

    def save_opened_epoch(self, number: int) -> None:
        """Note that keys are about to be exchanged: some sites may leave the epoch before."""
        self._write(OPENED, f"{number}\n".encode())

    def opened_epoch(self) -> int:
        """The last epoch that was opened, agreed on or not; 0 before the first."""
        path = self.path / OPENED
        return int(path.read_text()) if path.exists() else 0

    def manifests(self) -> list[Manifest]:
        """The manifest of every epoch, in order."""
        files = [self.path / f"epoch-{number}.json" for number in self.epochs()]
        return [Manifest.parse(file.read_text()) for file in files]

    def epochs(self) -> list[int]:
        """The numbers of the epochs that were agreed on."""
        return sorted(int(file.stem.split("-")[1]) for file in self.path.glob("epoch-*.json"))

    def epoch(self) -> Epoch | None:
        """The latest epoch, or None before the first."""
        manifests = self.manifests()
        if not manifests:
            return None
        file = self.path / f"keys-{manifests[-1].epoch}.json"
        roster, *agreements = json.loads(file.read_text())
        return Epoch(
            manifests[-1],
            from_table(roster, Roster),
            tuple(from_table(table, Agreement) for table in agreements),
        )

    def save_excluded(self, excluded: Mapping[str, str]) -> None:
        """Remember who left the run for good, and why."""
        self._write(EXCLUDED, (json.dumps(excluded, indent=2) + "\n").encode())

    def excluded(self) -> dict[str, str]:
        """Who left the run for good, and why."""
        path = self.path / EXCLUDED
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def save_pending(self, collected: Collected) -> None:
        """Keep a sum whose survivors are settled; it is masked still."""
        collected.save(self.path / PENDING)

    def pending(self) -> Collected | None:
        """The sum that was to be unmasked when the run stopped, or None."""
        path = self.path / PENDING
        return Collected.load(path) if path.exists() else None

    def drop_pending(self) -> None:
        """The sum was unmasked and the state after it is on disk."""
        (self.path / PENDING).unlink(missing_ok=True)

    def save(self, state: State, schema: Schema, line: Mapping[str, Any]) -> None:
        """Record a finished round; after this returns, the round cannot be lost."""
        self.save_model(state.round_number, state.model, schema)
        self._append_line(state.round_number, line)
        self.save_state(state)

    def save_model(self, round_number: int, model: NDArray[np.float32], schema: Schema) -> None:
        """Keep the global model after a round; round 0 is the initial one."""
        write_tensors(self.path / _model_name(round_number), schema.split(model))

    def save_state(self, state: State) -> None:
        """Move the point that a resumed run continues from; its model is already on disk."""
        about = {
            "round_number": state.round_number,
            "sum_number": state.sum_number,
            "exponents": state.exponents,
            "num_members": state.num_members,
            "validation": state.validation,
        }
        metadata = {"state": json.dumps(about)}
        write_tensors(self.path / STATE, state.optimizer, metadata=metadata)

    def latest(self, schema: Schema) -> State | None:
        """Where the run stands, or None before its first round is saved."""
        path = self.path / STATE
        if not path.exists():
            return None
        with safe_open(path, framework="numpy") as file:
            about = json.loads(file.metadata()["state"])
            optimizer = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return State(
            round_number=about["round_number"],
            sum_number=about["sum_number"],
            model=self.model(about["round_number"], schema),
            optimizer=optimizer,
            exponents=tuple(about["exponents"]),
            num_members=about["num_members"],
            validation=tuple(about["validation"]),
        )

    def model(self, round_number: int, schema: Schema) -> NDArray[np.float32]:
        """The global model after a round, shape (num_params,)."""
        model = np.empty(schema.num_params, np.float32)
        read_tensors(self.path / _model_name(round_number), schema.split(model))
        return model

    def tensors(self, round_number: int) -> dict[str, NDArray[np.float32]]:
        """The same by parameter name."""
        tensors: dict[str, NDArray[np.float32]] = load_file(self.path / _model_name(round_number))
        return tensors

    # Records

    def save_counts(self, name: str, counts: NDArray[np.int64]) -> None:
        """Keep the summed counts that figures are computed from."""
        with replacing(self.path / "counts" / f"{name}.npy", mode=0o644) as file:
            np.save(file, counts)

    def save_statements(self, statements: Iterable[Statement]) -> None:
        """Add to each site's signed privacy statements, one for every sum it was part of."""
        for statement in statements:
            (self.path / PRIVACY).mkdir(exist_ok=True)
            before = _read_statements(self._statements_of(statement.site))
            kept = [one for one in before if one.sum_number < statement.sum_number]
            tables = [one.model_dump() for one in (*kept, statement)]
            text = json.dumps(tables, indent=1) + "\n"
            self._write(f"{PRIVACY}/{statement.site}.json", text.encode())

    def all_statements(self) -> dict[str, list[Statement]]:
        """Each site's statements, in the order of the sums; none in a study without privacy."""
        files = sorted((self.path / PRIVACY).glob("*.json"))
        return {file.stem: _read_statements(file) for file in files}

    def statements(self) -> list[Statement]:
        """The sites' last statements, by name."""
        return [stated[-1] for stated in self.all_statements().values()]

    def save_evaluation(
        self, name: str, counts: NDArray[np.int64], line: Mapping[str, Any]
    ) -> None:
        """Record a sum that no training was part of; ``name`` as in ``counts``."""
        self.save_counts(name, counts)
        kept = [known for known in self.evaluations() if known["counts"] != name]
        lines = [*kept, {"counts": name, **line}]
        self._write(EVALUATIONS, "".join(json.dumps(known) + "\n" for known in lines).encode())

    def save_statistics(self, figures: Figures) -> None:
        """Write ``statistics.json``: figures of what the images are like."""
        self._write(f"{STATISTICS}.json", (json.dumps(figures, indent=2) + "\n").encode())

    def statistics(self) -> Figures | None:
        """What ``statistics.json`` holds; None in a run whose study asks for none."""
        path = self.path / f"{STATISTICS}.json"
        return dict(json.loads(path.read_text())) if path.exists() else None

    def evaluations(self) -> list[dict[str, Any]]:
        """One record per sum that no training was part of."""
        return self._lines(EVALUATIONS)

    def counts(self, name: str) -> NDArray[np.int64]:
        """Summed counts: ``validation-0007``, ``test`` or ``statistics``."""
        counts: NDArray[np.int64] = np.load(self.path / "counts" / f"{name}.npy")
        return counts

    def _append_line(self, round_number: int, line: Mapping[str, Any]) -> None:
        # A round that was recorded but whose state was lost is recorded again: drop its old line.
        kept = [known for known in self.rounds() if known["round"] < round_number]
        text = "".join(json.dumps(known) + "\n" for known in [*kept, line])
        self._write(ROUNDS, text.encode())

    def rounds(self) -> list[dict[str, Any]]:
        """One record per finished round."""
        return self._lines(ROUNDS)

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.path / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def save_final(
        self, model: NDArray[np.float32], schema: Schema, kept: Mapping[str, NDArray[np.float32]]
    ) -> str:
        """Write the returned model, its frozen part too, without metadata; its file's SHA-256."""
        write_tensors(self.path / FINAL, {**schema.own(model), **kept})
        return digest_of(self.path / FINAL)

    def final_model(self) -> dict[str, NDArray[np.float32]]:
        """The returned model by parameter name."""
        tensors: dict[str, NDArray[np.float32]] = load_file(self.path / FINAL)
        return tensors

    def save_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``; a run that has one is finished."""
        self._write(SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, else None."""
        path = self.path / SUMMARY
        if not path.exists():
            return None
        summary: dict[str, Any] = json.loads(path.read_text())
        return summary

    @property
    def is_sealed(self) -> bool:
        """Whether the list of digests was written."""
        return (self.path / SUMS).exists()

    def seal(self, identity: Identity) -> None:
        """List every file of the run with its SHA-256, signed by the coordinator."""
        files = (p for p in self.path.rglob("*") if p.is_file() and p.name[0] != ".")
        listed = [
            file
            for file in files
            if file.relative_to(self.path).parts[0] not in (CA, SITES, SUPERLINK)
            and file.stem not in (*REPORTS, SUMS)
        ]
        seal(self.path, listed, identity)

    # Writing

    def _statements_of(self, site: str) -> Path:
        return self.path / PRIVACY / f"{site}.json"

    def _write(self, name: str, content: bytes) -> None:
        # A record to be shared; the folder's own mode says who comes near it.
        replace_file(self.path / name, content, mode=0o644)


def _read_statements(file: Path) -> list[Statement]:
    """One site's statements; none where there is no file yet."""
    tables = json.loads(file.read_text()) if file.exists() else []
    return [Statement.parse(json.dumps(one)) for one in tables]


def _never_began(path: Path) -> bool:
    """Whether a start failed here before any site agreed, and nothing else lies in the folder."""
    present = {entry.name for entry in path.iterdir() if entry.name[0] != "."}
    present -= {file.name for file in path.glob("keys-*.json")}  # an epoch begins with its manifest
    started = {
        STUDY,
        SIMULATION,
        "models",
        "counts",
        CA,
        SITES,
        EVIDENCE,
        TRANSCRIPT,
        OPENED,
        AUDIT,
    }
    # Keys and site files of a demo, written before its run; or nothing but the first folders.
    if present <= {CA, SITES, "models", "counts"} and not any(path.glob("models/*")):
        return True
    return STUDY in present and present <= started and not any((path / "models").iterdir())


def _model_name(round_number: int) -> str:
    return f"models/round-{round_number:04d}.safetensors"
