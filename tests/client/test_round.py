"""A whole exchange with sites: invited, trained, scored, summed; and what a site does not take."""

import json
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from protocol import Cast, R

from client.evaluate import evaluate
from client.round import answer, local_update
from client.site import Site, Source, open_site, pick_device
from client.train import train
from common import wire
from common.errors import ConfigError, DataError, LocalProtocolError, RemoteProtocolError
from common.evidence import FILE as EVIDENCE
from common.manifest import KeyedMember, Manifest, Opening
from common.messages import (
    Agreement,
    Greeting,
    Introduction,
    Message,
    Purpose,
    Reason,
    Refusal,
    RoundTask,
    Shares,
    SiteKeys,
    Upload,
    Vote,
)
from common.models.build import build_network
from common.quantize import only_counts, quantize
from common.study import Study
from common.update import LocalUpdate, QuantizedUpdate

SiteFactory = Callable[..., Site]
StudyFactory = Callable[..., Study]


class Wired(Cast):
    """Every message goes over the wire and back, as Flower would carry it."""

    def ask(self, site: int, message: Message, kind: type[R]) -> R:
        carried = wire.unpack(wire.pack(message))
        reply = super().ask(site, carried, kind)
        returned = wire.unpack(wire.pack(reply))
        assert isinstance(returned, kind)
        return returned


Enrol = Callable[..., Wired]


@pytest.fixture
def enrol(make_site: SiteFactory, make_study: StudyFactory) -> Enrol:
    """All members of a study, enrolled; by default three sites of the tiny study."""

    def begin(study: Study | None = None) -> Wired:
        planned = study or make_study()
        sites = [make_site(planned, index) for index in range(len(planned.members))]
        cast = Wired.of(sites)
        cast.enrol()
        return cast

    return begin


@pytest.fixture
def cast(enrol: Enrol) -> Wired:
    return enrol()


@pytest.fixture
def site(cast: Wired) -> Site:
    member = cast.members[0]
    assert isinstance(member, Site)
    return member


def refused(rule: str, says: str = "") -> Any:
    """The rule stands in the message, and the peer is to blame."""
    return pytest.raises(RemoteProtocolError, match=rf"{says}.*\[{rule}\]$")


def same(one: Upload, other: Upload) -> bool:
    return one.body.tobytes() == other.body.tobytes() and one.header == other.header


def unmasked(cast: Wired, sum_number: int = 0, **changes: Any) -> QuantizedUpdate:
    """The total of one sum over everybody."""
    uploads = cast.uploads(sum_number, **changes)
    return cast.total(uploads, cast.shares(uploads))


def added(parts: list[QuantizedUpdate]) -> QuantizedUpdate:
    """The same sum without masks."""
    return QuantizedUpdate(
        np.sum([part.values for part in parts], axis=0, dtype=np.int32),
        np.sum([part.tail for part in parts], axis=0),
    )


def is_equal(one: QuantizedUpdate, other: QuantizedUpdate) -> bool:
    return np.array_equal(one.values, other.values) and np.array_equal(one.tail, other.tail)


def test_a_site_takes_part_in_exactly_its_own_study(cast: Wired) -> None:
    for index, site in enumerate(cast.members):
        keys = cast.keys[index]
        assert (keys.run, keys.site) == (cast.manifest.digest(), index)
        assert keys.certificate == site.party().identity.certificate
    assert len({keys.public_key for keys in cast.keys.values()}) == 3


def test_an_invitation_that_comes_again_gets_the_same_keys(make_site: SiteFactory) -> None:
    cast = Wired.of([make_site(index=index) for index in range(3)])
    invitation = cast.invitation()
    assert cast.ask(0, invitation, SiteKeys) == cast.ask(0, invitation, SiteKeys)


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_a_training_answer_has_the_size_of_the_manifest(
    bits: int, enrol: Enrol, make_study: StudyFactory
) -> None:
    cast = enrol(make_study({"aggregation.ring_bits": bits}))
    manifest = cast.manifest
    upload = cast.uploads(sites=[0])[0]
    assert (upload.run, upload.sum_number) == (cast.run.hex(), 0)
    assert upload.body.shape == (manifest.num_params * bits // 8 + 8 * manifest.num_tail,)
    # Besides the body: three shares of three secrets, one of them its own, and commitments.
    assert [len(sealed) for sealed in upload.sealed] == [0, 32 * 3 + 16, 32 * 3 + 16]
    assert [len(row) for row in upload.share_commitments] == [16 * 3] * 3
    assert len(upload.header) < 600


def trained(site: Site, task: RoundTask) -> LocalUpdate:
    """What the study says, done by hand."""
    return train(
        task.model, site.data.train, site.study.training,
        network=site.network, task=site.task, rng=site.rng(task.sum_number),
        rate=site.study.training.learning_rate,
    )  # fmt: skip


def counted(site: Site, task: RoundTask, split: str) -> Any:
    return evaluate(task.model, getattr(site.data, split), network=site.network, task=site.task)


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_the_total_is_that_of_the_trained_updates_and_the_scores_of_the_incoming_model(
    bits: int, enrol: Enrol, make_study: StudyFactory
) -> None:
    cast = enrol(make_study({"aggregation.ring_bits": bits}))
    task = cast.task(0)
    wanted = added(
        [
            quantize(
                trained(site, task), counted(site, task, "validation"),
                sizes=site.network.schema.sizes, exponents=task.exponents, weight=site.weight,
                weight_cap=cast.manifest.weight_cap, ring=cast.manifest.ring,
            )
            for site in cast.members
        ]
    )  # fmt: skip
    assert wanted.values.any()
    assert is_equal(unmasked(cast), wanted)
    sites = [site.data for site in cast.members]
    assert wanted.tail[0] == sum(data.train.num_patients for data in sites)


@pytest.mark.parametrize(
    ("purpose", "split"), [(Purpose.VALIDATE, "validation"), (Purpose.TEST, "test")]
)
def test_a_score_touches_one_split_and_sends_no_weights(
    purpose: Purpose, split: str, cast: Wired
) -> None:
    task = cast.task(0, purpose=purpose, model=cast.model + np.float32(0.1))
    parts = [
        only_counts(counted(site, task, split), site.weight, len(task.exponents))
        for site in cast.members
    ]
    total = unmasked(cast, purpose=purpose, model=task.model)
    assert total.values.shape == (0,)
    assert total.tail.tolist() == added(parts).tail.tolist()
    figures = cast.members[0].task.figures(total.tail[1 + len(task.exponents) :])
    assert figures["num_examples"] == sum(len(getattr(s.data, split)) for s in cast.members) > 0


def test_clipped_entries_are_counted_in_the_tail_by_tensor(cast: Wired) -> None:
    exponents = (-120, *cast.manifest.exponents[1:])
    clipped = unmasked(cast, exponents=exponents).tail[1 : 1 + len(exponents)].tolist()
    assert 0 < clipped[0] <= 3 * cast.members[0].network.schema.sizes[0]
    assert clipped[1:] == [0] * (len(exponents) - 1)


def test_a_whole_run_is_answered_and_each_answer_can_be_had_again(cast: Wired, site: Site) -> None:
    purposes = [Purpose.TRAIN, Purpose.TRAIN, Purpose.VALIDATE, Purpose.TEST]
    for number, purpose in enumerate(purposes):
        model = cast.model + np.float32(number)
        first, again = (cast.uploads(number, purpose=purpose, model=model) for _ in range(2))
        assert all(same(first[k], again[k]) for k in cast.sites)
        assert cast.shares(first) == cast.shares(again)
    with refused("R4", "sum 3 was answered since"):
        answer(cast.task(0, 2), site)


def test_a_restarted_site_gives_the_same_bytes_and_goes_on(
    cast: Wired, site: Site, make_site: SiteFactory
) -> None:
    uploads = cast.uploads()
    site.journal.close()
    cast.members[0] = make_site()
    assert same(cast.uploads()[0], uploads[0])
    before = cast.total(uploads, cast.shares(uploads))
    after = unmasked(cast, 1, model=cast.model + np.float32(1e-6))
    assert not np.array_equal(before.values, after.values)  # another sum draws other batches


def test_two_sites_learn_different_things(cast: Wired) -> None:
    one, other, _ = (local_update(cast.task(0), site, {}).values for site in cast.members)
    assert not np.array_equal(one, other)


# What a site is proposed

FOREIGN = {
    "study": "f" * 64,
    "threshold": 2,
    "num_sums": 10_000,
    "num_params": 7,
    "num_tail": 3,
    "num_statistics": 5,
    "schema_digest": "f" * 64,
    "first_model": "f" * 64,
    "exponents": (-3,),
    "ring_bits": 16,
    "weight_cap": 3,
    "code": "f" * 64,
}


@pytest.fixture
def uninvited(make_site: SiteFactory) -> Wired:
    return Wired.of([make_site(index=index) for index in range(3)])


@pytest.mark.parametrize("key", FOREIGN)
def test_a_manifest_of_another_study_is_refused_naming_the_key(key: str, uninvited: Wired) -> None:
    site = uninvited.members[0]
    with refused("R2", f"not this study's: {key} is ") as stopped:
        answer(uninvited.invitation(**{key: FOREIGN[key]}), site)
    assert str(stopped.value).count(", expected ") == 1
    with refused("R7", "before an invitation"):
        answer(Greeting(), site)


def _members(cast: Wired, *chosen: int) -> tuple[KeyedMember, ...]:
    return tuple(cast.manifest.members[k] for k in chosen)


OPENINGS = {
    "a member that nobody approved": (
        lambda cast: {"members": (*_members(cast, 0, 1, 2), KeyedMember(name="m", key="f" * 64))},
        "R2", "m is proposed as a member, and it was not approved",
    ),
    "a member's key is another one": (
        lambda cast: {"members": (*_members(cast, 0, 1), KeyedMember(name="site-3", key="f" * 64))},
        "R2", "site-3 is proposed as a member, and its key is another one",
    ),
    "a member twice": (lambda cast: {"members": _members(cast, 0, 1, 1)}, "R2", "proposed twice"),
    "members in another order": (
        lambda cast: {"members": _members(cast, 1, 0, 2)}, "R2", "not in the study's order",
    ),
    "too few members": (lambda cast: {"members": _members(cast, 0, 1)}, "R2", "2 of 3 members"),
    "without this site": (
        lambda cast: {"members": _members(cast, 1, 2)}, "R2", "site-1 is not among",
    ),
    "another coordinator": (lambda _: {"coordinator": "f" * 64}, "R3", "not the one approved"),
    "from tomorrow on": (lambda cast: {"valid_from": cast.manifest.valid_until}, "R2", "is valid"),
    "until yesterday": (lambda cast: {"valid_until": cast.manifest.valid_from}, "R2", "is valid"),
}  # fmt: skip


@pytest.mark.parametrize("title", OPENINGS)
def test_what_a_coordinator_chooses_is_checked_too(title: str, uninvited: Wired) -> None:
    changes, rule, sentence = OPENINGS[title]
    with refused(rule, sentence):
        answer(uninvited.invitation(**changes(uninvited)), uninvited.members[0])


def test_every_part_of_the_manifest_is_checked_but_the_names_of_run_and_epoch() -> None:
    assert {*FOREIGN, "version", *Opening.model_fields} == set(Manifest.model_fields)
    checked = {"members", "coordinator", "valid_from", "valid_until"}
    assert set(Opening.model_fields) - checked == {"run", "epoch", "nonce"}


def test_a_refused_manifest_leaves_the_open_session_alone(cast: Wired, site: Site) -> None:
    uploads = cast.uploads()
    with refused("R2"):
        answer(cast.invitation(weight_cap=3, nonce="f" * 32), site)
    assert same(cast.uploads()[0], uploads[0])
    assert cast.shares(uploads)


def spoilt_manifests(good: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Title, text, and what the refusal says."""
    yield "not JSON", "epoch = 1", ""
    yield "empty", "", ""
    yield "a list", "[]", ""
    yield "another version", json.dumps({**good, "version": 2}), "version"
    yield "a key too many", json.dumps({**good, "hook": "rm"}), "hook"
    yield "a key too few", json.dumps({k: v for k, v in good.items() if k != "nonce"}), "nonce"
    yield "a short nonce", json.dumps({**good, "nonce": "0"}), "nonce"
    yield "epoch 0", json.dumps({**good, "epoch": 0}), "epoch"
    yield "a ring of 8 bits", json.dumps({**good, "ring_bits": 8}), "ring_bits"
    yield "text for a number", json.dumps({**good, "num_sums": "9"}), "num_sums"
    yield "members without keys", json.dumps({**good, "members": ["site-1"]}), "members"
    yield "no run", json.dumps({**good, "run": ""}), "run"


@pytest.mark.parametrize("number", range(12))
def test_what_is_no_manifest_is_refused(number: int, uninvited: Wired) -> None:
    good = uninvited.invitation()
    _, text, key = list(spoilt_manifests(json.loads(good.manifest)))[number]
    spoilt = uninvited.sign(replace(good, manifest=text))
    with pytest.raises(RemoteProtocolError, match=f"not a manifest of this version: .*{key}"):
        answer(spoilt, uninvited.members[0])


# What else a site does not take

NOT_FOR_A_SITE: list[Message] = [
    Greeting(),
    Introduction(index=1),
    SiteKeys("a" * 64, 0, b"", b"", b"", b""),
    Agreement("a" * 64, 0, (), ()),
    Upload("a" * 64, 0, b"", (), (), np.zeros(0, np.uint8)),
    Vote("a" * 64, 0, 0, b""),
    Shares("a" * 64, 0, 0, b"", (), ()),
    Refusal(run="", reason=Reason.BUSY),
]


@pytest.mark.parametrize("message", NOT_FOR_A_SITE, ids=lambda message: type(message).__name__)
def test_a_kind_of_message_that_a_site_does_not_take_is_refused(
    message: Message, site: Site
) -> None:
    with refused("R7", f"a site does not take {type(message).__name__}"):
        answer(message, site)


@pytest.mark.parametrize(
    ("purpose", "round_number"),
    [(Purpose.TRAIN, 0), (Purpose.TRAIN, 3), (Purpose.TEST, 3), (Purpose.VALIDATE, 4)],
)
def test_a_round_that_the_study_does_not_have_is_refused(
    purpose: Purpose, round_number: int, cast: Wired, site: Site
) -> None:
    task = cast.task(0, purpose=purpose, round_number=round_number)
    with refused("R4", f"round {round_number} is not one of the study's"):
        answer(task, site)


def test_a_refused_message_is_kept_as_evidence_for_this_user_alone(cast: Wired, site: Site) -> None:
    task = cast.task(0, 99)
    with refused("R4"):
        answer(task, site)
    path = site.state_dir / EVIDENCE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (line,) = map(json.loads, path.read_text().splitlines())
    assert line["rule"] == "R4"
    assert "sum 99" in line["reason"]
    assert line["message"]["kind"] == "RoundTask"
    assert line["message"]["signature"] == task.signature.hex()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_model_that_is_not_finite_is_refused(wrong: float, cast: Wired, site: Site) -> None:
    model = cast.model.copy()
    model[-1] = wrong
    with refused("R4", "the model holds NaN or infinity"):
        answer(cast.task(0, model=model), site)


def test_an_update_that_is_not_finite_is_never_uploaded(cast: Wired, site: Site) -> None:
    with pytest.raises(DataError, match="training diverged"):
        answer(cast.task(0, model=np.full_like(cast.model, 3e38)), site)
    assert site.journal.sum() is None
    assert unmasked(cast).values.any()  # the number was not spent


def test_a_site_without_a_certificate_sends_nothing(cast: Wired, site: Site) -> None:
    alone = replace(site, credentials=None)
    for message in (cast.renewed().invitation(), cast.task(0)):
        with pytest.raises(LocalProtocolError, match="site-1 trains alone"):
            answer(message, alone)


def test_a_site_that_is_no_member_cannot_be_opened(make_site: SiteFactory, tmp_path: Path) -> None:
    site = make_site()
    with pytest.raises(ConfigError, match="mallory is not a member of study tiny"):
        open_site(
            "mallory",
            site.study,
            Source("tiny", 3, None, site.load, site.count),
            state_dir=tmp_path,
            device=pick_device("cpu"),
        )


def test_a_site_cannot_declare_more_patients_than_the_studys_cap(
    make_site: SiteFactory, make_study: StudyFactory
) -> None:
    with pytest.raises(ConfigError, match=r"site-1 declares \d+ patients, .*weight_cap is 3"):
        make_site(make_study({"aggregation.weight_cap": 3}))


def test_the_stream_of_a_sum_depends_on_seed_site_and_number(
    make_site: SiteFactory, make_study: StudyFactory
) -> None:
    sites = [make_site(), make_site(index=1), make_site(make_study(seed=4))]
    seeds = {site.rng(number).initial_seed() for site in sites for number in (0, 1)}
    assert len(seeds) == 6
    assert make_site().rng(1).initial_seed() == sites[0].rng(1).initial_seed()


def test_the_first_model_is_the_one_that_the_study_gives(uninvited: Wired) -> None:
    networks = [build_network(site.study).vector() for site in uninvited.members]
    assert all(np.array_equal(vector, uninvited.model) for vector in networks)
    assert {site.first_model for site in uninvited.members} == {uninvited.manifest.first_model}
