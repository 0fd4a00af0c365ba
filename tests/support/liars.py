"""A whole run over phantoms in which one site lies to the coordinator."""

import functools
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from faulty_network import Fault, FaultyNetwork
from federation import Watcher, answers_of, federate, open_sites, tiny_study
from hostile import evidence_in, quick_journal, serial_number

from client.round import answer
from client.site import Site
from common.authority import REVOKED, Authority
from common.identity import Identity
from common.messages import Message, RoundTask
from common.throwaway import CA, site_credentials

Lie = Callable[["Liar", Message, Message], Message]  # what was asked, what an honest site answers


class Liar:
    """One site of a run that answers as it is told."""

    def __init__(self, site: Site, folder: Path, lie: Lie, kind: type[Message], number: int | None):
        self.site, self.folder, self._lie = site, folder, lie
        self._kind, self._number = kind, number
        self.heard: dict[tuple[str, type[Message]], Message] = {}  # by site, from the network
        self.said: list[Message] = []

    def answer(self, message: Message) -> Message:
        reply = answer(message, self.site)
        is_due = isinstance(reply, self._kind)
        if not is_due or getattr(message, "sum_number", None) != self._number:
            return reply
        self.said.append(self._lie(self, message, reply))
        return self.said[-1]

    @property
    def identity(self) -> Identity:
        return self.site.party().identity

    def key_of(self, name: str) -> Identity:
        """Another site's: the two work together."""
        names = self.site.study.site_names
        return site_credentials(self.folder, name, names).identity

    @property
    def authority(self) -> Authority:
        return Authority.load(self.folder / CA)


class Run:
    """A run that has ended, and its folder."""

    def __init__(self, folder: Path, summary: dict[str, Any], watcher: Watcher) -> None:
        self.folder, self.summary, self.watcher = folder, summary, watcher
        self.final = summary["final_model_sha256"]

    @property
    def rounds(self) -> list[dict[str, Any]]:
        lines = (self.folder / "rounds.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def evidence(self) -> list[dict[str, Any]]:
        return evidence_in(self.folder)

    @property
    def members(self) -> list[list[str]]:
        """Of every epoch that anybody agreed to."""
        found = sorted(self.folder.glob("epoch-*.json"))
        return [[m["name"] for m in json.loads(path.read_text())["members"]] for path in found]


class Hospitals:
    """Sites over phantoms, and the network between them and the coordinator."""

    def __init__(self, folder: Path, num_sites: int, num_rounds: int = 1) -> None:
        self.folder = folder
        self.study = tiny_study(num_sites, num_rounds=num_rounds)
        for name in self.study.site_names:
            quick_journal(folder / "hospitals" / "sites" / name).close()
        self.sites = open_sites(self.study, folder / "hospitals")
        for site in self.sites.values():
            site.journal._database.execute("PRAGMA synchronous = OFF")
        self.network = FaultyNetwork(answers_of(self.sites))
        self.watcher = Watcher()

    def lie(self, name: str, kind: type[Message], lie: Lie, *, number: int | None = None) -> Liar:
        """One site lies about one sum, or in the exchange of keys where ``number`` is None."""
        liar = Liar(self.sites[name], self.folder / "hospitals", lie, kind, number)

        def listening(other: str, ask: Callable[[Message], Message], message: Message) -> Message:
            reply = ask(message)
            liar.heard[other, type(reply)] = reply
            return reply

        for other, ask in list(self.network.answers.items()):
            self.network.answers[other] = functools.partial(listening, other, ask)
        self.network.answers[name] = liar.answer
        return liar

    def silent(self, *names: str) -> "Hospitals":
        """These sites do not answer the first task."""
        self.network.faults = lambda name, message: (
            Fault.SILENT
            if name in names and isinstance(message, RoundTask) and message.sum_number == 0
            else None
        )
        return self

    def revoke(self, *names: str) -> None:
        """The authority publishes that these certificates are void."""
        folder = self.folder / "hospitals"
        numbers = [
            serial_number(site_credentials(folder, name, self.study.site_names).identity)
            for name in names
        ]
        now = datetime.now(UTC)
        content = Authority.load(folder / CA).revocation_list(numbers, now, days=1)
        (folder / CA / REVOKED).write_bytes(content)

    def run(self) -> Run:
        folder = self.folder / "run"
        try:
            summary = federate(
                self.study,
                folder,
                network=self.network,
                watcher=self.watcher,
                sites_in=self.folder / "hospitals",
            )
        finally:
            for site in self.sites.values():
                site.journal.close()
        return Run(folder, summary, self.watcher)
