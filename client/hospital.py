"""One hospital and every study it takes part in: which one a message is about, and who may ask."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from client.approvals import Approvals
from client.config import SiteConfig, deployed
from client.dataset import load_site_data
from client.journal import JOURNAL
from client.own_files import OwnFiles
from client.place import NEWEST_LIST
from client.policy import check_policy, check_unit
from client.round import COORDINATOR, answer
from client.site import AUDIT, Site, Source, open_site, pick_device, utc_now
from client.statistics import count_images
from common.audit import MAX_VALUE_CHARS, AuditLog
from common.disk import hold_lock, is_full, remove_leftovers, replace_file
from common.errors import ConfigError, DataError, FederationError, PolicyError, RemoteProtocolError
from common.facts import facts_of
from common.manifest import Manifest
from common.messages import Greeting, Introduction, Invitation, Message
from common.roster import Credentials, Trust
from common.study import Study

STUDIES, BEGAN = "studies", "began"  # folders: one per study, and which studies there were
CURRENT, LOCK = "current-study", ".lock"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0  # after refusals in a row; the coordinator waits 30 s


class Hospital:
    """Answers the coordinator; the network and the images of the current study stay in memory."""

    def __init__(self, config: SiteConfig, now: Callable[[], datetime] = utc_now) -> None:
        """Open this hospital's books.

        Raises:
          ConfigError: The site file lacks what a deployment needs; or another process runs.
        """
        files = deployed(config)
        self.config = config
        self.home = config.state_dir
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._now = now
        self._lock()
        remove_leftovers(self.home)
        self._files = OwnFiles(files, self.home / NEWEST_LIST, now)
        self.approvals = Approvals(self.home)
        self.audit = AuditLog(self.home / AUDIT, now)
        self._current: tuple[str, Site] | None = None
        self._num_refused = 0  # in a row

    def pause_s(self) -> float:
        """How long to wait before the next message: nobody may fill a disk with refused ones."""
        if not self._num_refused:
            return 0.0
        return float(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self._num_refused - 1, 16)))

    def answer(self, message: Message) -> Message:
        """Answer one message.

        Raises:
          FederationError: The hospital does not answer; the reason stays here.
          OSError: The disk is full; the same message may be answered again.
        """
        self._num_refused += 1
        answered = self._answer(message)
        self._num_refused = 0
        return answered

    def _answer(self, message: Message) -> Message:
        if isinstance(message, Greeting):
            return self._audited(message, self._introduce)
        try:
            site = self._site_for(message)
        except Exception as error:
            if is_full(error):
                raise
            refusal = error  # raised again once it is in the audit log
            return self._audited(message, functools.partial(_refuse, error=refusal))
        return answer(message, site)

    def permitted(self, digest: str) -> Study:
        """The study of a digest, if it was approved here and the policy permits it.

        Raises:
          PolicyError: It was not, or does not.
        """
        study = self.approvals.study(digest)
        if study is None and not self.config.policy.require_approval:
            study = self.approvals.proposed(digest)
        if study is None:
            raise PolicyError(
                f"study {digest[:12]}... was not approved here (require_approval is true): read "
                f"{self.home / 'proposed' / digest}.toml, then fl-client approve it"
            )
        if self.config.name not in study.site_names or list(study.unpinned()):
            raise PolicyError(
                f"study {study.name} does not name {self.config.name} and every key; ask the "
                "coordinator for a corrected study"
            )
        check_policy(self.config.policy, study, self.config.data.declared_patients)
        check_unit(self.config.data, study)
        return study

    def _introduce(self, greeting: Message) -> Message:
        """Say whether this hospital takes part in the proposed study; its file is kept to read."""
        assert isinstance(greeting, Greeting)  # noqa: S101 - answer() has looked
        study, _ = self.approvals.propose(greeting.study)
        permitted = self.permitted(study.digest())
        return Introduction(permitted.site_names.index(self.config.name))

    def _audited(self, message: Message, reply: Callable[[Message], Message]) -> Message:
        self.audit.append("received", peer=COORDINATOR, **facts_of(message))
        try:
            said = reply(message)
        except FederationError as error:
            reason = f"{type(error).__name__}: {error}"[:MAX_VALUE_CHARS]
            self.audit.append("refused", peer=COORDINATOR, rule=error.rule, reason=reason)
            raise
        except Exception as error:
            if not is_full(error):
                self.audit.append("refused", peer=COORDINATOR, rule="", reason=type(error).__name__)
            raise
        self.audit.append("sent", peer=COORDINATOR, **facts_of(said))
        return said

    def _site_for(self, message: Message) -> Site:
        """The site of the study that a message is about; a new run is the current one from here."""
        if isinstance(message, Invitation):
            digest = Manifest.parse(message.manifest).study
            site = self._opened(digest)
            replace_file(self.home / CURRENT, digest.encode())
            return site
        path = self.home / CURRENT
        if not path.exists():
            raise RemoteProtocolError("a message arrived before an invitation", rule="R7")
        return self._opened(path.read_text())

    def _opened(self, digest: str) -> Site:
        """A site of a permitted study; permission is asked anew for every message."""
        study = self.permitted(digest)
        if self._current is None or self._current[0] != digest:
            self._current = digest, self._open(study)
        return self._current[1]

    def _open(self, study: Study) -> Site:
        data, budget = self.config.data, self.config.budget
        if data.declared_patients is None:
            raise ConfigError("data.declared_patients is needed: a public constant, not a count")
        load = functools.partial(load_site_data, data, study, folder=self.config.state_dir)
        count = functools.partial(count_images, data, study)
        began = self._check_folder(study)
        site = open_site(
            self.config.name,
            study,
            Source(data.name, data.declared_patients, budget, load, count),
            state_dir=self.home / STUDIES / study.digest(),
            home=self.home,
            device=pick_device(self.config.device),
            credentials=functools.partial(self._credentials, study),
            policy=self.config.policy,
        )
        # Its journal lies on disk now. What failed before said nothing yet, and may be corrected.
        began.parent.mkdir(mode=0o700, exist_ok=True)
        replace_file(began, b"")
        return site

    def _check_folder(self, study: Study) -> Path:
        """Refuse to begin anew where this hospital took part before and its journal is gone.

        Returns:
          The mark that says from now on that it took part.

        Raises:
          DataError: R6.
        """
        began = self.home / BEGAN / study.digest()
        journal = self.home / STUDIES / study.digest() / JOURNAL
        if began.exists() and not journal.exists():
            raise DataError(
                f"the journal in {STUDIES}/{study.digest()} is gone, and with it what this site "
                f"said in study {study.name}; restore it, or leave the study",
                rule="R6",
            )
        return began

    def _credentials(self, study: Study) -> Credentials:
        assert study.coordinator is not None  # noqa: S101 - permitted() has looked
        trust = Trust(
            ca=self._files.ca(),
            members={member.name: member.key or "" for member in study.members},
            coordinator=study.coordinator.key,
            newest_list=self.home / NEWEST_LIST,
        )
        self._files.take_list(trust)
        return Credentials(self._files.identity(), trust)

    def _lock(self) -> None:
        """Keep a second process of this hospital out for as long as this object lives."""
        if not hold_lock(self.home / LOCK, self):
            raise ConfigError(
                f"state_dir {self.home}: another fl-client takes part with it; run one only"
            )


def _refuse(_: Message, error: Exception) -> Message:
    raise error
