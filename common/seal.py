"""A signed list of files: none has changed since, and whose list it is.

``SHA256SUMS`` is what ``sha256sum -c`` reads; ``SHA256SUMS.sig`` holds its signature and the
signer's certificate.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from common.disk import replace_file
from common.errors import ConfigError, FederationError
from common.identity import Certified, Identity, check_signature, read_certified
from common.secagg.encoding import encode

SUMS, SIGNATURE = "SHA256SUMS", "SHA256SUMS.sig"
_MODE = 0o644  # records to be shared; the folder's own mode says who comes near them


def seal(folder: Path, files: Iterable[Path], identity: Identity) -> None:
    """List files of a folder with their SHA-256, and sign the list."""
    lines = [f"{digest_of(file)}  {file.relative_to(folder)}\n" for file in sorted(files)]
    sums = "".join(lines).encode()
    signature = identity.sign(_content(identity.certificate, sums))
    replace_file(folder / SIGNATURE, _signed(identity.certificate, signature), mode=_MODE)
    replace_file(folder / SUMS, sums, mode=_MODE)


def read_sums(folder: Path) -> dict[str, str]:
    """File name to SHA-256.

    Raises:
      FederationError: A line is not one of such a list.
    """
    digests = {}
    text = (folder / SUMS).read_bytes().decode("utf-8", "replace")
    for number, line in enumerate(text.splitlines(), 1):
        found = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if found is None:
            raise FederationError(f"{SUMS}: line {number} is not a SHA-256 and a file name")
        digests[found.group(2)] = found.group(1)
    return digests


def check_files(folder: Path, digests: dict[str, str]) -> None:
    """Refuse a folder in which a file is missing or is not the one that was recorded.

    Raises:
      FederationError: The message names the file.
    """
    for name, recorded in digests.items():
        if not (folder / name).is_file():
            raise FederationError(f"{name} is missing; restore it, {SUMS} lists it")
        found = digest_of(folder / name)
        if found != recorded:
            raise FederationError(
                f"{name} differs: its SHA-256 is {found[:12]}..., {SUMS} has {recorded[:12]}...; "
                "restore the file that was listed"
            )


def check_signature_of(folder: Path) -> Certified:
    """Who signed the list; whether that is who should have is the caller's to ask.

    Raises:
      FederationError: There is no signature, or it is not good.
    """
    path = folder / SIGNATURE
    if not path.is_file():
        raise FederationError(f"{SIGNATURE} is missing: whose list {SUMS} is cannot be told")
    try:
        signed = json.loads(path.read_text(encoding="utf-8"))
        certificate = bytes.fromhex(signed["certificate"])
        signer = read_certified(certificate)
        signature = bytes.fromhex(signed["signature"])
    except (ValueError, KeyError, TypeError, ConfigError, FederationError):
        raise FederationError(
            f"{SIGNATURE} is damaged: it is not a certificate and a signature"
        ) from None
    sums = (folder / SUMS).read_bytes()
    if path.read_bytes() != _signed(certificate, signature):
        raise FederationError(f"{SIGNATURE} is damaged: it is not as it was written")
    if not check_signature(signer.key, signature, _content(certificate, sums)):
        raise FederationError(
            f"{SIGNATURE}: the signature of {signer.name} under {SUMS} is not good: one of the two "
            "was changed"
        )
    return signer


def digest_of(file: Path) -> str:
    """A file's SHA-256; the file is never in memory as a whole."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _signed(certificate: bytes, signature: bytes) -> bytes:
    table = {"certificate": certificate.hex(), "signature": signature.hex()}
    return json.dumps(table, indent=1).encode() + b"\n"


def _content(certificate: bytes, sums: bytes) -> bytes:
    """What is signed: also the certificate, of which only the key would be looked at else."""
    return encode("consilium/sums", certificate, sums)
