"""Who takes part: the members of each epoch, who left for good and who came late."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from cryptography import x509

from common.errors import RemoteProtocolError, RoundAborted
from common.identity import check_certificate, read_revocation_list
from common.manifest import Manifest, Opening, smallest_epoch
from common.messages import Reason
from common.study import Study
from server.epoch import Epoch, exchange_keys
from server.exchange import Exchange
from server.heads import Heads
from server.run_dir import RunDir
from server.secure_sum import Total, Void

DAY_S = 86_400
CLOCKS_DIFFER_S = 300
RETRY_SUMS = 5  # a site that did not take part in an epoch is invited again after so many sums
NEVER = -1
FINAL = (Reason.POLICY, Reason.VERSION)  # a site that says so will say so again


class Cohort:
    """The members of a run, from epoch to epoch."""

    def __init__(
        self,
        study: Study,
        exchange: Exchange,
        run_dir: RunDir,
        plan: Callable[[Opening], Manifest],
        heads: Heads,
    ) -> None:
        self._study = study
        self._exchange = exchange
        self._run_dir = run_dir
        self._plan = plan
        self._heads = heads
        self._excluded = run_dir.excluded()
        self._absent: dict[str, int] = {}  # sums until a site is invited again, or NEVER
        self._awaited: set[str] = set()  # members that may be away now, and are expected back

    def resume(self) -> Epoch:
        """The epoch that a run goes on with: the first, the last one agreed on, or a new one.

        A run that stopped while keys were exchanged opens a new epoch: some sites have left the
        last one already, and nobody goes back.

        Raises:
          RoundAborted: Too few members took part.
        """
        last, opened = self._run_dir.epoch(), self._run_dir.opened_epoch()
        if last is None:
            return self._open(1, secrets.token_hex(16))
        if opened > last.manifest.epoch:
            return self._open(opened + 1, last.manifest.run)
        return last

    def renew(self, epoch: Epoch, last: Total | Void) -> Epoch:
        """The epoch that the next sum belongs to: the same, unless the members changed.

        Raises:
          RoundAborted: Too few members are left.
        """
        credentials = self._exchange.credentials
        revoked = read_revocation_list(
            credentials.revoked(), credentials.trust.ca, self._exchange.now()
        )
        self._note(epoch, last, revoked)
        manifest = epoch.manifest
        # Who missed no deadline is not left out for a link that is down at this moment.
        self._awaited = set(manifest.names) - set(last.refusals)
        deadlines = self._study.deadlines
        needed_s = deadlines.upload_s + 2 * deadlines.unmask_s
        ended = int(self._exchange.now().timestamp()) > manifest.valid_until - needed_s
        certified = all(self._is_certified(one, revoked) for one in epoch.roster.certificates)
        if not ended and certified and self._present() == list(manifest.names):
            return epoch
        return self._open(manifest.epoch + 1, manifest.run)

    def _note(
        self, epoch: Epoch, last: Total | Void, revoked: x509.CertificateRevocationList
    ) -> None:
        """Remember who left for good."""
        left = {
            site: "its privacy budget is spent"
            for site, reason in last.refusals.items()
            if reason == Reason.BUDGET
        }
        left |= last.convicted
        left |= dict.fromkeys(epoch.on_list(revoked), "its certificate was revoked")
        if left.keys() - self._excluded.keys():
            self._excluded = {**left, **self._excluded}
            self._run_dir.save_excluded(self._excluded)
        self._absent = {site: sums - 1 for site, sums in self._absent.items() if sums != 1}

    def _is_certified(self, certificate: bytes, revoked: x509.CertificateRevocationList) -> bool:
        ca, now = self._exchange.credentials.trust.ca, self._exchange.now()
        try:
            check_certificate(certificate, ca, revoked, now)
        except RemoteProtocolError:
            return False
        return True

    def _present(self) -> list[str]:
        """Approved members that can be asked, or will be, in the study's order."""
        expected = set(self._exchange.network.sites()) | self._awaited
        expected -= set(self._excluded) | set(self._absent)
        return [name for name in self._exchange.credentials.trust.members if name in expected]

    def _open(self, number: int, run: str) -> Epoch:
        """Exchange keys with those who are present; whoever does not answer is left out."""
        approved = self._exchange.credentials.trust.members
        reasons = dict.fromkeys(approved, "cannot be reached") | self._excluded
        needed = max(self._study.cohort.min_sites, smallest_epoch(len(approved)))
        while len(members := self._present()) >= needed:
            now = int(self._exchange.now().timestamp())
            opening = Opening(
                run=run,
                epoch=number,
                members=tuple(self._heads.member(name, approved[name]) for name in members),
                coordinator=self._exchange.credentials.identity.fingerprint,
                valid_from=now - CLOCKS_DIFFER_S,
                valid_until=now + self._lifetime_s(),
                nonce=secrets.token_hex(16),
            )
            self._run_dir.save_opened_epoch(number)
            epoch, missing = exchange_keys(self._exchange, self._plan(opening))
            if epoch is not None:
                self._run_dir.save_epoch(epoch)
                return epoch
            for site, reason in missing.items():
                self._absent[site] = NEVER if reason in FINAL else RETRY_SUMS
            reasons |= missing
            number += 1
        named = ", ".join(
            f"{site} ({reason})" for site, reason in reasons.items() if site not in members
        )
        raise RoundAborted(
            f"{len(members)} sites take part, {needed} are needed; not there: {named}. "
            "The last model is in the run folder; see the logs of the sites named"
        )

    def _lifetime_s(self) -> int:
        """Long enough for every sum of the study to take as long as it may."""
        deadlines = self._study.deadlines
        sum_s = deadlines.upload_s + 2 * deadlines.unmask_s  # uploads, votes, shares
        return DAY_S + int(2 * (deadlines.keys_s + self._study.num_rounds * sum_s))
