"""``fl-certs``: the consortium's CA, and the certificates of sites and coordinator.

certs/README.md says who runs which command on which machine.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from common.authority import REVOKED, pem, write_key
from common.certs_show import on_list, papers_at, party_lines, viewer
from common.cli import start
from common.errors import ConfigError
from common.identity import Role, fingerprint, read_certificate, read_party, revocation_number
from common.issued import ISSUED
from common.registry import LIST_DAYS, Registry, replace, writing
from common.request import Request, is_name, make_request, read_request

KEY, REQUEST, ISSUED_TO = "key.pem", "request.pem", "certificate.pem"  # in a party's folder
CA_DAYS, PARTY_DAYS = 3650, 730
MAX_DAYS = 36_500
MAX_NAME = 64  # characters, X.520
FINGERPRINT_DIGITS = 64

CaOption = Annotated[Path, typer.Option("--ca", help="The CA's folder.")]
OutOption = Annotated[Path | None, typer.Option(help="Where the certificate is written.")]
DaysOption = Annotated[int, typer.Option(min=1, max=MAX_DAYS, help="How long it is good.")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def certs() -> None:
    """Certificates of a consortium; certs/README.md says who runs which command where."""


@app.command()
def ca(
    out: Annotated[Path, typer.Option(help="A new folder.")],
    name: Annotated[str, typer.Option(help="The consortium's name.")] = "Consilium consortium",
    days: DaysOption = CA_DAYS,
) -> None:
    """Make the consortium's CA: its key, its certificate, an empty revocation list."""
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable() or name.isspace():
        raise ConfigError(f"--name {name!r}: expected 1 to {MAX_NAME} characters that print")
    registry = Registry.create(out, name, _now(), days=days)
    _print(*party_lines(registry.authority.certificate))
    _print(
        "",
        f"{out}/ca.key never leaves this machine. {out}/ca.pem goes to every site and to the",
        f"coordinator, {out}/revoked.crl to the coordinator; it ends in {LIST_DAYS} days.",
    )


@app.command()
def request(
    name: Annotated[str, typer.Option(help="Lower-case letters, digits and dashes.")],
    out: Annotated[Path, typer.Option(help="The folder for key.pem and request.pem.")],
    role: Annotated[Role, typer.Option(help="What it is a certificate for.")] = "site",
    host: Annotated[
        list[str], typer.Option(help="DNS name or IP address of the coordinator; repeatable.")
    ] = [],  # noqa: B006
) -> None:
    """Make a key on this machine, and a request that the CA signs."""
    key = ec.generate_private_key(ec.SECP256R1())
    content = make_request(name, role, host, key)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        _write_new_key(out / KEY, key)
    replace(out / REQUEST, content)
    _print(
        f"{out / KEY}: the key; it never leaves this machine",
        f"{out / REQUEST}: send this to the CA's operator",
        f"fingerprint  {fingerprint(key.public_key())}",
        "Read the fingerprint to the CA's operator over the telephone.",
    )


@app.command()
def sign(
    ca: CaOption,
    request: Annotated[Path, typer.Argument(help="The request.pem that came.")],
    out: OutOption = None,
    days: DaysOption = PARTY_DAYS,
    heard: Annotated[
        str, typer.Option("--fingerprint", help="As it was read over the telephone.")
    ] = "",
) -> None:
    """Certify the key in a request; without --out beside it."""
    asked = read_request(request)
    if heard and _digits(heard) != asked.fingerprint:
        raise ConfigError(
            f"{request}: its key is {asked.fingerprint}, --fingerprint differs; "
            "do not sign: somebody else may have sent it"
        )
    place = _checked_place(ca, out or request.with_name(ISSUED_TO), asked.name)
    _issue(Registry.open(ca), asked, place, days)
    if not heard:
        _print("", "Compare the fingerprint with its owner over the telephone before you send it.")


@app.command()
def renew(
    ca: CaOption,
    who: Annotated[str, typer.Argument(metavar="NAME|CERT", help="A name or a certificate.")],
    out: OutOption = None,
    days: DaysOption = PARTY_DAYS,
) -> None:
    """Certify the same key again; without --out: ./NAME.pem, or in the place of CERT."""
    registry = Registry.open(ca)
    asked = registry.renewal(who)
    place = Path(f"{who}.pem") if is_name(who) else Path(who)
    _issue(registry, asked, _checked_place(ca, out or place, asked.name), days)


@app.command()
def revoke(
    ca: CaOption,
    who: Annotated[
        list[str], typer.Argument(metavar="[NAME|CERT]...", help="Nobody: only a fresh list.")
    ] = [],  # noqa: B006
    days: DaysOption = LIST_DAYS,
) -> None:
    """Put every certificate of somebody on the list of the revoked, and sign the list."""
    registry = Registry.open(ca)
    revoked = registry.revoke(who, _now(), days=days)
    _print(
        f"{ca / REVOKED}: number {revocation_number(revoked)}, "
        f"valid until {revoked.next_update_utc:%Y-%m-%d %H:%M} (UTC)",
        *on_list(revoked, registry.issued()),
        "",
        "Copy it to the coordinator now, over the file that its configuration names: it is read",
        "anew for every message, nothing is restarted.",
    )


@app.command()
def show(
    paths: Annotated[list[Path], typer.Argument(help="Files or folders.")],
    ca: Annotated[
        Path | None, typer.Option("--ca", help="A folder with ca.pem and revoked.crl.")
    ] = None,
) -> None:
    """Say what certificates, requests, keys and lists hold; exit 1 if one has expired."""
    papers = [paper for path in paths for paper in papers_at(path)]
    against = viewer([paper for _, paper in papers], ca, _now())
    is_expired = False
    for path, paper in papers:
        described = against.describe(path, paper)
        is_expired |= described.is_expired
        _print(f"{path}", *(f"  {line}" for line in described.lines))
    if is_expired:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of ``fl-certs``."""
    start(app)


def _write_new_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    try:
        write_key(path, key, overwrite=False)
    except FileExistsError:
        raise ConfigError(
            f"{path} exists and is never overwritten: fl-certs renew keeps the key and needs no "
            "request; for a new key choose another --out"
        ) from None


def _digits(heard: str) -> str:
    """A fingerprint as it was typed: in groups, in capitals, with colons."""
    digits = "".join(heard.replace(":", " ").replace("-", " ").split()).lower()
    if len(digits) != FINGERPRINT_DIGITS or set(digits) - set("0123456789abcdef"):
        raise ConfigError(f"--fingerprint: expected {FINGERPRINT_DIGITS} hexadecimal digits")
    return digits


def _checked_place(ca: Path, place: Path, name: str) -> Path:
    """Refuse to write a certificate over a key, or over what the CA keeps."""
    if place.resolve().parent in (ca.resolve(), (ca / ISSUED).resolve()):
        raise ConfigError(f"{place}: the CA's own folder; choose another --out")
    if not place.exists():
        return place
    try:
        owner, *_ = read_party(read_certificate(place))
    except ConfigError:
        owner = ""
    if owner != name:
        raise ConfigError(f"{place} is not a certificate of {name}; choose another --out")
    return place


def _issue(registry: Registry, asked: Request, place: Path, days: int) -> None:
    """Certify, write, and say what goes into the study file."""
    certificate = registry.issue(asked, _now(), days=days)
    with writing(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
    replace(place, pem(certificate))
    _print(f"{place}", *_paste(asked, certificate))


def _paste(asked: Request, certificate: x509.Certificate) -> list[str]:
    """What was certified, and the same as the study file wants it."""
    member = ["[[members]]", f'name = "{asked.name}"']
    lines = member if asked.role == "site" else ["[coordinator]"]
    key = f'key = "{asked.fingerprint}"'
    return [*party_lines(certificate), "", "For the study file:", "", *lines, key]


def _print(*lines: str) -> None:
    for line in lines:
        typer.echo(line)


def _now() -> datetime:
    return datetime.now(UTC)
