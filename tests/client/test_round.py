"""A whole exchange with one site: invited, trained, scored; and what a site does not take."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.evaluate import evaluate
from client.round import answer
from client.site import Site, open_site, pick_device
from client.train import train
from common import wire
from common.errors import ConfigError, DataError, RemoteProtocolError
from common.manifest import Manifest, plan_epoch
from common.messages import (
    Greeting,
    Introduction,
    Invitation,
    Message,
    Present,
    Purpose,
    Reason,
    Refusal,
    RoundTask,
    Upload,
)
from common.models.build import build_network
from common.quantize import dequantize
from common.secagg.masking import unmask, unpack
from common.study import Study

NONCE = "0" * 32
SiteFactory = Callable[..., Site]
StudyFactory = Callable[..., Study]


def invitation(site: Site, **changes: Any) -> Invitation:
    """What the coordinator of this study sends; ``changes`` are another study's values."""
    digest = hashlib.sha256(build_network(site.study).vector().tobytes()).hexdigest()
    manifest = plan_epoch(
        site.study, site.network.schema, site.task, first_model=digest, epoch=1, nonce=NONCE
    )
    return Invitation(manifest.model_copy(update=changes).canonical())


def join(site: Site) -> Manifest:
    opened = invitation(site)
    assert isinstance(answer(opened, site), Present)
    return Manifest.parse(opened.manifest)


def task(site: Site, manifest: Manifest, sum_number: int = 0, **changes: Any) -> RoundTask:
    asked = RoundTask(
        run=manifest.digest(),
        sum_number=sum_number,
        round_number=1,
        purpose=Purpose.TRAIN,
        exponents=manifest.exponents,
        model=build_network(site.study).vector(),
    )
    return replace(asked, **changes)


def ask(message: Message, site: Site) -> Message:
    """Over the wire and back, as Flower would carry it."""
    return wire.unpack(wire.pack(answer(wire.unpack(wire.pack(message)), site)))


def uploaded(message: Message, site: Site) -> Upload:
    reply = ask(message, site)
    assert isinstance(reply, Upload)
    return reply


def test_a_site_takes_part_in_exactly_its_own_study(make_site: SiteFactory) -> None:
    site = make_site(index=1)
    manifest = Manifest.parse(invitation(site).manifest)
    assert ask(invitation(site), site) == Present(run=manifest.digest(), site="site-2")
    assert ask(invitation(site), site) == Present(run=manifest.digest(), site="site-2")


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_a_training_answer_has_the_size_of_the_manifest(
    bits: int, make_site: SiteFactory, make_study: StudyFactory
) -> None:
    site = make_site(make_study({"aggregation.ring_bits": bits}))
    manifest = join(site)
    upload = uploaded(task(site, manifest), site)
    assert (upload.run, upload.sum_number) == (manifest.digest(), 0)
    assert upload.body.shape == (manifest.num_params * bits // 8,)
    assert upload.tail.shape == (manifest.num_tail,)


def tail_of(upload: Upload, site: Site) -> tuple[int, list[int], dict[str, Any]]:
    """Weight, clipped entries per tensor, figures."""
    tail = upload.tail.view(np.int64)
    num_tensors = len(site.network.schema.names)
    figures = site.task.figures(tail[1 + num_tensors :])
    return int(tail[0]), tail[1 : 1 + num_tensors].tolist(), figures


def test_the_answer_is_the_trained_update_and_the_score_of_the_incoming_model(
    make_site: SiteFactory, make_study: StudyFactory
) -> None:
    # As large a weight cap as the site's weight: no precision is spent on other sites.
    site = make_site(make_study({"aggregation.weight_cap": 40}))
    manifest = join(site)
    asked = task(site, manifest)
    upload = uploaded(asked, site)
    sizes = site.network.schema.sizes
    mean = dequantize(
        unmask(unpack(upload.body, bits=32), bits=32),
        sizes=sizes, exponents=asked.exponents, weight=site.weight, weight_cap=40,
    )  # fmt: skip
    wanted = train(
        asked.model, site.data.train, site.study.training,
        network=site.network, task=site.task, rng=site.rng(0),
        rate=site.study.training.learning_rate,
    ).values  # fmt: skip
    half_step = 2.0 ** asked.exponents[0] / 2 * 40 / site.weight
    assert np.abs(mean - wanted).max() <= half_step + 1e-7
    assert wanted.any()
    counts = evaluate(asked.model, site.data.validation, network=site.network, task=site.task)
    weight, clipped, figures = tail_of(upload, site)
    assert (weight, clipped) == (site.data.train.num_patients, [0] * len(sizes))
    assert figures == site.task.figures(counts)
    assert figures["num_examples"] == len(site.data.validation)


@pytest.mark.parametrize(
    ("purpose", "split"), [(Purpose.VALIDATE, "validation"), (Purpose.TEST, "test")]
)
def test_a_score_touches_one_split_and_sends_no_weights(
    purpose: Purpose, split: str, make_site: SiteFactory
) -> None:
    site = make_site()
    manifest = join(site)
    asked = task(site, manifest, purpose=purpose, model=build_network(site.study).vector() + 0.1)
    upload = uploaded(asked, site)
    images = getattr(site.data, split)
    counts = evaluate(asked.model, images, network=site.network, task=site.task)
    weight, clipped, figures = tail_of(upload, site)
    assert upload.body.shape == (0,)
    assert upload.tail.shape == (manifest.num_tail,)
    assert (weight, set(clipped)) == (site.weight, {0})
    assert figures == site.task.figures(counts)
    assert figures["num_examples"] == len(images) > 0


def test_clipped_entries_are_counted_in_the_tail_by_tensor(make_site: SiteFactory) -> None:
    site = make_site()
    manifest = join(site)
    num_tensors = len(manifest.exponents)
    exponents = (-120, *manifest.exponents[1:])
    _, clipped, _ = tail_of(uploaded(task(site, manifest, exponents=exponents), site), site)
    assert 0 < clipped[0] <= site.network.schema.sizes[0]
    assert clipped[1:] == [0] * (num_tensors - 1)


def test_a_whole_run_is_answered_and_each_answer_can_be_had_again(make_site: SiteFactory) -> None:
    site = make_site()
    manifest = join(site)
    purposes = [Purpose.TRAIN, Purpose.TRAIN, Purpose.VALIDATE, Purpose.TEST]
    for sum_number, purpose in enumerate(purposes):
        asked = task(site, manifest, sum_number, purpose=purpose)
        first, again = uploaded(asked, site), uploaded(asked, site)
        assert first.body.tobytes() == again.body.tobytes()
        assert first.tail.tobytes() == again.tail.tobytes()
    with pytest.raises(RemoteProtocolError, match="sums after 3"):
        answer(task(site, manifest, 2), site)


def test_a_restarted_site_gives_the_same_bytes_and_goes_on(make_site: SiteFactory) -> None:
    site = make_site()
    manifest = join(site)
    first = uploaded(task(site, manifest), site)
    site.journal.close()
    restarted = make_site()
    again = uploaded(task(restarted, manifest), restarted)
    assert again.body.tobytes() == first.body.tobytes()
    second = uploaded(task(restarted, manifest, 1), restarted)
    assert second.body.tobytes() != first.body.tobytes()  # another sum draws other batches


def test_two_sites_send_different_updates(make_site: SiteFactory) -> None:
    sites = [make_site(index=index) for index in range(2)]
    one, other = (uploaded(task(site, join(site)), site) for site in sites)
    assert one.body.tobytes() != other.body.tobytes()


FOREIGN = {
    "study": "f" * 64,
    "members": ("site-1", "site-2", "mallory"),
    "num_sums": 10_000,
    "num_params": 7,
    "num_tail": 3,
    "schema_digest": "f" * 64,
    "first_model": "f" * 64,
    "exponents": (-3,),
    "ring_bits": 16,
    "weight_cap": 3,
    "code": "9.9.9",
}


@pytest.mark.parametrize("key", FOREIGN)
def test_a_manifest_of_another_study_is_refused_naming_the_key(
    key: str, make_site: SiteFactory
) -> None:
    site = make_site()
    with pytest.raises(RemoteProtocolError, match=f"not this study's: {key} is ") as refused:
        answer(invitation(site, **{key: FOREIGN[key]}), site)
    assert str(refused.value).count(", expected ") == 1
    with pytest.raises(RemoteProtocolError, match="before an invitation"):
        answer(task(site, Manifest.parse(invitation(site).manifest)), site)


def test_every_part_of_the_manifest_is_checked_but_epoch_and_nonce() -> None:
    assert {*FOREIGN, "version", "epoch", "nonce"} == set(Manifest.model_fields)


def test_a_refused_manifest_leaves_the_open_session_alone(make_site: SiteFactory) -> None:
    site = make_site()
    manifest = join(site)
    first = uploaded(task(site, manifest), site)
    with pytest.raises(RemoteProtocolError):
        answer(invitation(site, weight_cap=3), site)
    assert uploaded(task(site, manifest), site).body.tobytes() == first.body.tobytes()


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


@pytest.mark.parametrize("number", range(10))
def test_what_is_no_manifest_is_refused(number: int, make_site: SiteFactory) -> None:
    site = make_site()
    _, text, key = list(spoilt_manifests(json.loads(invitation(site).manifest)))[number]
    with pytest.raises(RemoteProtocolError, match=f"not a manifest of this version: .*{key}"):
        answer(Invitation(text), site)


NOT_FOR_A_SITE: list[Message] = [
    Greeting(),
    Introduction(index=1),
    Present(run="a" * 64, site="site-2"),
    Upload(run="a" * 64, sum_number=0, body=np.zeros(0, np.uint8), tail=np.zeros(0, np.uint64)),
    Refusal(run="", reason=Reason.BUSY),
]


@pytest.mark.parametrize("message", NOT_FOR_A_SITE, ids=lambda message: type(message).__name__)
def test_a_kind_of_message_that_a_site_does_not_take_is_refused(
    message: Message, make_site: SiteFactory
) -> None:
    with pytest.raises(RemoteProtocolError, match=f"a site does not take {type(message).__name__}"):
        answer(message, make_site())


def test_a_model_that_is_not_finite_is_never_trained_into_an_upload(make_site: SiteFactory) -> None:
    site = make_site()
    manifest = join(site)
    broken = build_network(site.study).vector() * np.float32(np.nan)
    with pytest.raises(DataError, match="not finite"):
        answer(task(site, manifest, model=broken), site)
    assert uploaded(task(site, manifest), site).body.size  # the number was not spent


def test_a_site_that_is_no_member_cannot_be_opened(make_site: SiteFactory, tmp_path: Path) -> None:
    site = make_site()
    with pytest.raises(ConfigError, match="mallory is not a member of study tiny"):
        open_site(
            "mallory",
            site.study,
            site.load,
            data_name="tiny",
            weight=3,
            budget=None,
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
