"""The secure sum a second time, as plainly as the specification reads, and its stored vector.

Nothing of the product is imported: bytes are joined, masks are added entry by entry, shares are
polynomials over logarithm tables. ``python tests/secagg/plain_protocol.py`` writes
``tests/vectors/masked_sum_v1.json`` anew. Every input is SHAKE-256 of a label, except the
ML-KEM ciphertexts: encapsulation is random, so those that are stored are used again.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import ECB

VECTOR = Path(__file__).parent.parent / "vectors/masked_sum_v1.json"
SOURCE = (
    "tests/secagg/plain_protocol.py, an implementation of MaskedSum v1 apart from the product's; "
    "inputs are SHAKE-256 of labels"
)
NUM_SITES, THRESHOLD, SUM_NUMBER, DROPOUT = 4, 3, 2, 2
NUM_PARAMS = 21  # 84 bytes of stream: the tail begins at 96
RINGS = (32, 24, 16)  # bits
SITES = range(NUM_SITES)
SURVIVORS = [site for site in SITES if site != DROPOUT]


def enc(*parts: Any) -> bytes:
    content = b""
    for part in parts:
        if isinstance(part, int):
            written = part.to_bytes(8, "big")
        elif isinstance(part, str):
            written = part.encode()
        elif isinstance(part, list):
            written = enc(*part)
        else:
            written = part
        content += len(written).to_bytes(4, "big") + written
    return content


def sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def labelled(label: str, *parts: Any) -> bytes:
    return sha256(enc("msum1/" + label, *parts))


def kdf(key: bytes, label: str, *parts: Any) -> bytes:
    return hmac.new(key, enc("msum1/" + label, *parts) + b"\x01", "sha256").digest()


POWER = [1]
for _ in range(254):
    doubled = POWER[-1] << 1
    POWER.append((doubled ^ 0x11B if doubled & 0x100 else doubled) ^ POWER[-1])
LOG = {power: exponent for exponent, power in enumerate(POWER)}


def times(a: int, b: int) -> int:
    return POWER[(LOG[a] + LOG[b]) % 255] if a and b else 0


def over(a: int, b: int) -> int:
    return POWER[(LOG[a] - LOG[b]) % 255] if a else 0


def power(x: int, exponent: int) -> int:
    return POWER[LOG[x] * exponent % 255]


def share(secret: bytes, coefficients: Sequence[bytes], x: int) -> bytes:
    """The value at x of one polynomial per byte; ``coefficients`` of x, x^2, ..."""
    values = []
    for place, value in enumerate(secret):
        for exponent, drawn in enumerate(coefficients, start=1):
            value ^= times(drawn[place], power(x, exponent))  # noqa: PLW2901 - a running sum
        values.append(value)
    return bytes(values)


def at_zero(points: Mapping[int, bytes]) -> bytes:
    """Lagrange's formula at x = 0, byte by byte."""
    secret = []
    for place in range(len(next(iter(points.values())))):
        total = 0
        for x, values in points.items():
            term = values[place]
            for other in points:
                if other != x:
                    term = times(term, over(other, x ^ other))
            total ^= term
        secret.append(total)
    return bytes(secret)


def stream(key: bytes, num_bytes: int) -> bytes:
    """AES-256 of the counters 0, 1, 2, ..."""
    counters = b"".join(k.to_bytes(16, "big") for k in range(-(-num_bytes // 16)))
    cipher = Cipher(AES256(key), ECB()).encryptor()  # noqa: S305 - a counter mode by hand
    return cipher.update(counters)[:num_bytes]


def masked(
    values: Sequence[int], tail: Sequence[int], masks: Sequence[tuple[bytes, int]], bits: int
) -> bytes:
    """The body of an upload; a mask is its key and +1 or -1."""
    tail_begins = -(-4 * len(values) // 16) * 16
    entries, last = list(values), list(tail)
    for key, sign in masks:
        made = stream(key, tail_begins + 8 * len(tail))
        for m in range(len(entries)):
            entries[m] += sign * int.from_bytes(made[4 * m : 4 * m + 4], "little")
        for m in range(len(last)):
            start = tail_begins + 8 * m
            last[m] += sign * int.from_bytes(made[start : start + 8], "little")
    packed = [(entry % 2**bits).to_bytes(bits // 8, "little") for entry in entries]
    return b"".join(packed) + b"".join((entry % 2**64).to_bytes(8, "little") for entry in last)


def draw(label: str, num_bytes: int) -> bytes:
    return hashlib.shake_256(f"masked sum vector v1: {label}".encode()).digest(num_bytes)


def signing_key(site: int) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(
        int.from_bytes(draw(f"signing key {site}", 32), "big"), ec.SECP256R1()
    )


def inputs(ciphertexts: Mapping[str, str]) -> dict[str, Any]:
    sites = [
        {
            "x25519_private_key": draw(f"x25519 {site}", 32).hex(),
            "ml_kem_768_seed": draw(f"ml-kem {site}", 64).hex(),
            "nonce": draw(f"nonce {site}", 16).hex(),
            "p256_private_key": draw(f"signing key {site}", 32).hex(),
            "randomness": draw(f"randomness {site}", 32 * (1 + NUM_SITES * (THRESHOLD - 1))).hex(),
            "statement": f"statement of site {site}" if site else "",
        }
        for site in SITES
    ]
    kept = dict(ciphertexts)
    for one, other in combinations(SITES, 2):
        if f"{one}-{other}" not in kept:
            seed = bytes.fromhex(sites[other]["ml_kem_768_seed"])
            public = MLKEM768PrivateKey.from_seed_bytes(seed).public_key()
            assert isinstance(public, MLKEM768PublicKey)
            kept[f"{one}-{other}"] = public.encapsulate()[1].hex()
    return {
        "manifest_digest": draw("manifest", 32).hex(),
        "threshold": THRESHOLD,
        "sum_number": SUM_NUMBER,
        "task": {
            "model_digest": draw("model", 32).hex(),
            "round_number": 2,
            "exponents": [-22, 0, 5],
            "purpose": "train",
        },
        "sites": sites,
        "ciphertexts": kept,  # by "sender-receiver"
        "dropout": DROPOUT,
        "updates": {str(bits): [update(bits, site) for site in SITES] for bits in RINGS},
    }


def update(bits: int, site: int) -> dict[str, list[int]]:
    """Drawn integers, and the largest and smallest that a site may send."""
    bound = (2 ** (bits - 1) - 1) // NUM_SITES
    content = draw(f"update {bits} {site}", 8 * NUM_PARAMS)
    drawn = [
        int.from_bytes(content[k : k + 8], "big") % (2 * bound + 1) - bound
        for k in range(0, len(content), 8)
    ]
    return {"values": [bound, -bound, *drawn[2:]], "tail": [100 + site, 7 * site, -(2**40) - site]}


def agreed(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the sites know after the keys were exchanged."""
    of_site = [
        {k: bytes.fromhex(v) for k, v in s.items() if k != "statement"} for s in given["sites"]
    ]
    private = [X25519PrivateKey.from_private_bytes(s["x25519_private_key"]) for s in of_site]
    kem = [MLKEM768PrivateKey.from_seed_bytes(s["ml_kem_768_seed"]) for s in of_site]
    public = [key.public_key().public_bytes_raw() for key in private]
    kem_public = [key.public_key().public_bytes_raw() for key in kem]
    listed = [[public[s], kem_public[s], of_site[s]["nonce"]] for s in SITES]
    run = labelled("run", bytes.fromhex(given["manifest_digest"]), listed)
    asked = given["task"]
    exponents = [e.to_bytes(8, "big", signed=True) for e in asked["exponents"]]
    content = sha256(enc(asked["model_digest"], asked["round_number"], exponents, asked["purpose"]))
    task = labelled("task", run, SUM_NUMBER, content)
    pairs = {}
    for one, other in combinations(SITES, 2):
        dh = private[one].exchange(X25519PublicKey.from_public_bytes(public[other]))
        ciphertext = bytes.fromhex(given["ciphertexts"][f"{one}-{other}"])
        secret = kem[other].decapsulate(ciphertext)
        chains = [kdf(hmac.new(run, dh + secret, "sha256").digest(), "pair", one, other)]
        for step in range(SUM_NUMBER):
            chains.append(kdf(chains[-1], "chain", step))
        chain = chains[-1]
        pairs[f"{one}-{other}"] = {
            "x25519": dh,
            "ml_kem_768": secret,
            "chain_keys": chains,  # of sums 0, 1, ...
            "mask_key": kdf(chain, "mask", SUM_NUMBER, task, one, other),
            "share_key": kdf(chain, "share-key", SUM_NUMBER, task, one, other),
            "share_key_back": kdf(chain, "share-key", SUM_NUMBER, task, other, one),
        }
    return {
        "public_keys": public,
        "ml_kem_768_keys_sha256": [sha256(key) for key in kem_public],
        "run": run,
        "task": task,
        "pairs": pairs,
    }


def shared(site: int, given: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """One site's secrets of the sum, split, committed to and sealed."""
    run, task = keys["run"], keys["task"]
    random = bytes.fromhex(given["sites"][site]["randomness"])
    secrets = [
        random[:32] if other == site else pair(keys, site, other)["mask_key"] for other in SITES
    ]
    length = 32 * NUM_SITES
    drawn = [random[32 + k * length :][:length] for k in range(THRESHOLD - 1)]
    shares = [share(b"".join(secrets), drawn, other + 1) for other in SITES]
    rows, sealed = [], []
    for other in SITES:
        slots = [shares[other][32 * slot : 32 * slot + 32] for slot in SITES]
        rows.append(
            b"".join(
                labelled("share", run, SUM_NUMBER, site, other, slot, value)[:16]
                for slot, value in enumerate(slots)
            )
        )
        content = b""
        if other != site:
            key = pair(keys, site, other)["share_key" if site < other else "share_key_back"]
            context = enc("msum1/share-ad", run, SUM_NUMBER, task, site, other)
            content = ChaCha20Poly1305(key).encrypt(bytes(12), shares[other], context)
        sealed.append(content)
    digests = [sha256(enc(row, content)) for row, content in zip(rows, sealed, strict=True)]
    return {
        "secrets": secrets,
        "commitments": [
            labelled("secret", run, SUM_NUMBER, min(site, slot), max(site, slot), secret)
            for slot, secret in enumerate(secrets)
        ],
        "shares": shares,
        "share_commitments": rows,
        "sealed": sealed,
        "row_digests": digests,
        "rows": sha256(b"".join(digests)),
    }


def uploaded(
    site: int, bits: int, given: Mapping[str, Any], keys: Mapping[str, Any], mine: Mapping[str, Any]
) -> dict[str, Any]:
    """One site's masked body and its header, signed as RFC 6979 says: always the same bytes."""
    changed = given["updates"][str(bits)][site]
    masks = [(secret, 1 if other >= site else -1) for other, secret in enumerate(mine["secrets"])]
    body = masked(changed["values"], changed["tail"], masks, bits)
    statement = sha256(given["sites"][site]["statement"].encode())
    content = enc(
        "msum1/header",
        keys["run"],
        SUM_NUMBER,
        keys["task"],
        site,
        sha256(body),
        statement,
        b"".join(mine["commitments"]),
        mine["rows"],
    )
    repeatable = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
    signature = signing_key(site).sign(content, repeatable)
    return {"body": body, "body_sha256": sha256(body), "header": content + enc(signature)}


def pair(keys: Mapping[str, Any], one: int, other: int) -> Mapping[str, Any]:
    found: Mapping[str, Any] = keys["pairs"][f"{min(one, other)}-{max(one, other)}"]
    return found


def summed(bits: int, given: Mapping[str, Any]) -> dict[str, list[int]]:
    """What must come out: the plain sum over the survivors."""
    updates = [given["updates"][str(bits)][site] for site in SURVIVORS]
    return {
        part: [sum(column) for column in zip(*(one[part] for one in updates), strict=True)]
        for part in ("values", "tail")
    }


def vector(ciphertexts: Mapping[str, str]) -> dict[str, Any]:
    """Everything, as it is stored."""
    given = inputs(ciphertexts)
    keys = agreed(given)
    sharing = [shared(site, given, keys) for site in SITES]
    sums = {}
    for bits in RINGS:
        uploads = [uploaded(site, bits, given, keys, sharing[site]) for site in SITES]
        headers = [uploads[site]["header"] for site in SURVIVORS]
        view = labelled("survivors", keys["run"], SUM_NUMBER, keys["task"], headers)
        sums[str(bits)] = {"uploads": uploads, "view": view, "sum": summed(bits, given)}
    return plain_json(
        {
            "source": SOURCE,
            "inputs": given,
            "keys": keys,
            "sharing": sharing,
            "sums": sums,
            "messages": messages(),
        }
    )


def signed_content(kind: str, fields: Mapping[str, Any]) -> bytes:
    """The bytes that a message's sender signs: integers may be negative, arrays are left out."""

    def written(value: Any) -> Any:
        if isinstance(value, list):
            return [written(entry) for entry in value]
        return value.to_bytes(8, "big", signed=True) if isinstance(value, int) else value

    return enc("msum1/" + kind, *(written(value) for value in fields.values()))


def messages() -> dict[str, Any]:
    """One signed message of each kind, its fields in the order in which they are signed."""
    run, entries = "72756e", [b"\x01", b"\x02\x03"]
    about = {"run": run, "sum_number": 3}
    view = {**about, "survivors": [0, 1, 3], "headers": [b"h0", b"h1", b"h3"]}
    fields: dict[str, dict[str, Any]] = {
        "Invitation": {"manifest": "{}", "certificate": b"cert", "revoked": b"crl"},
        "SiteKeys": {
            "run": run,
            "site": 1,
            "public_key": b"x25519",
            "kem_key": b"ml-kem",
            "nonce": b"once",
            "certificate": b"cert",
        },
        "Roster": {
            "run": run,
            "public_keys": entries,
            "kem_keys": [b"k0", b"k1"],
            "nonces": [b"n0", b"n1"],
            "certificates": [b"c0", b""],
            "signatures": [b"s0", b"s1"],
            "revoked": b"crl",
        },
        "Agreement": {
            "run": run,
            "site": 1,
            "ciphertexts": entries,
            "ciphertext_signatures": [b"s2", b"s3"],
        },
        "Encapsulated": {"run": run, "sender": 1, "receiver": 2, "ciphertext": b"ct"},
        "RoundTask": {
            **about,
            "round_number": 2,
            "purpose": "train",
            "exponents": [-22, 0, 5],
            "model_digest": "ab" * 32,
            "ciphertexts": [],
            "ciphertext_signatures": [],
            "revoked": b"crl",
        },
        "Survivors": view,
        "Vote": {**about, "site": 0, "view": b"view"},
        "Unmask": {
            **view,
            "voters": [0, 3],
            "votes": entries,
            "sealed": [b"s0", b"", b"s3"],
            "share_commitments": [b"c0", b"c1", b"c3"],
            "row_digests": [b"d0", b"d1", b"d3"],
        },
        "Shares": {
            **about,
            "site": 1,
            "view": b"view",
            "shares": [b"a", b"b", b""],
            "complaints": [3],
        },
    }
    return {
        kind: {"fields": content, "signed_content": signed_content(kind, content)}
        for kind, content in fields.items()
    }


def plain_json(value: Any) -> Any:
    """Bytes as hex, everything else as it is."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: plain_json(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [plain_json(entry) for entry in value]
    return value


def main() -> None:
    stored = json.loads(VECTOR.read_text()) if VECTOR.exists() else {"inputs": {"ciphertexts": {}}}
    made = vector(stored["inputs"]["ciphertexts"])
    VECTOR.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
