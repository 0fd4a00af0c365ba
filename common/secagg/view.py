"""The survivors of a sum as everybody must see them: rules R9 to R12."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import RemoteProtocolError
from common.messages import Survivors, Unmask, Vote
from common.secagg.encoding import digest
from common.secagg.header import Header
from common.signing import check_signed

Keys = Sequence[ec.EllipticCurvePublicKey]  # by site


def digest_of_view(run: bytes, sum_number: int, task: bytes, headers: Sequence[bytes]) -> bytes:
    """What a vote is about: the signed headers of exactly these survivors; 32 bytes."""
    return digest("survivors", run, sum_number, task, list(headers))


def check_view(
    view: Survivors | Unmask,
    *,
    own: Header,
    threshold: int,
    keys: Keys,
) -> Mapping[int, Header]:
    """Check a view as the site whose own header is ``own``.

    Returns:
      The survivors' headers by site.

    Raises:
      RemoteProtocolError: R9, R10 or R11.
    """
    survivors, num_sites = view.survivors, len(keys)
    if list(survivors) != sorted(set(survivors)):
        raise RemoteProtocolError("the survivors are not sorted, or one is there twice", rule="R9")
    if any(not 0 <= site < num_sites for site in survivors):
        raise RemoteProtocolError(f"a survivor is none of the {num_sites} members", rule="R9")
    if len(view.headers) != len(survivors):
        raise RemoteProtocolError("there is not one header for each survivor", rule="R9")
    if len(survivors) < threshold:
        raise RemoteProtocolError(
            f"{len(survivors)} survivors, {threshold} are needed: nothing may be unmasked",
            rule="R10",
        )
    by_site = dict(zip(survivors, view.headers, strict=True))
    if by_site.get(own.site) != own.encode():
        raise RemoteProtocolError("this site's own header is missing or altered", rule="R10")
    headers = {site: Header.decode(content) for site, content in by_site.items()}
    for site, header in headers.items():
        header.check_signature(keys[site], f"site {site}")
        about = (header.run, header.sum_number, header.task, header.site, header.num_slots)
        if about != (own.run, own.sum_number, own.task, site, num_sites):
            raise RemoteProtocolError(
                f"the header of site {site} is of another sum or another task", rule="R11"
            )
    return headers


def check_votes(request: Unmask, *, view: bytes, threshold: int, keys: Keys) -> None:
    """Refuse to unmask for fewer than everybody without the votes of ``threshold`` survivors.

    Raises:
      RemoteProtocolError: R12.
    """
    if len(request.survivors) == len(keys):
        return
    if len(request.voters) != len(request.votes):
        raise RemoteProtocolError("there is not one vote for each voter", rule="R12")
    if len(set(request.voters)) != len(request.voters):
        raise RemoteProtocolError("a site votes twice", rule="R12")
    if not set(request.voters) <= set(request.survivors):
        raise RemoteProtocolError("a voter is not among the survivors", rule="R12")
    if len(request.voters) < threshold:
        raise RemoteProtocolError(
            f"{len(request.voters)} votes, {threshold} are needed", rule="R12"
        )
    for site, signature in zip(request.voters, request.votes, strict=True):
        vote = Vote(request.run, request.sum_number, site, view, signature)
        check_signed(vote, keys[site], sender=f"site {site}", rule="R12")
