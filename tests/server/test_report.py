import json
import re
import shutil
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from finished import words_of
from sealed import coordinator_of, seal_again

from client.config import PhantomData
from client.prepare import prepare
from common.audit import AuditLog
from common.config import validate
from common.errors import ConfigError, FederationError
from common.manifest import KeyedMember, Opening, plan_epoch
from common.messages import (
    Agreement,
    Invitation,
    Message,
    Purpose,
    Reason,
    Refusal,
    Roster,
    RoundTask,
    Shares,
    SiteKeys,
    Survivors,
    Unmask,
    Upload,
    Vote,
)
from common.models.build import build_network
from common.phantom import draw_patient, scanner_of_site
from common.simulation import Simulation
from common.study import Input, Study
from common.tasks import task_of
from common.throwaway import issue_identities
from server import report_cli
from server.epoch import Epoch
from server.exchange import utc_now
from server.network import LoopbackNetwork
from server.report import digests_of, verify, write_report
from server.reporting.classes import figures_by_class
from server.reporting.facts import privacy_lines
from server.reporting.phantoms import PHANTOM_SEED, prepare_phantoms
from server.run_dir import AUDIT, RunDir
from server.state import State
from server.transcript import ObservedNetwork

SITES = ("east", "north", "south", "west")
MOST = SITES[:3]  # without west
PHANTOMS = Simulation(num_sites=4, data={"name": "phantoms", "format": "phantom"})
KINDS = {
    "binary": ("no lesion", "lesion"),
    "multiclass": ("a", "b", "c", "d", "e"),
    "multilabel": ("effusion", "nodule", "mass"),
}


@dataclass
class Made:
    """A finished run folder and what stands in it."""

    path: Path
    study: Study
    summary: dict

    @cached_property
    def page(self) -> str:
        return write_report(self.path).read_text()

    @property
    def text(self) -> str:
        """What a person reads."""
        return words_of(self.page)

    @property
    def facts(self) -> dict:
        assert self.page
        return json.loads((self.path / "report.json").read_text())

    def seal_again(self) -> None:
        seal_again(self.path)


def study_of(labels="binary", classes=None, **settings) -> Study:
    table = {
        "name": "made-up",
        "num_rounds": 2,
        "task": {"kind": "classification", "labels": labels, "classes": classes or KINDS[labels]},
        "model": {"name": "cnn", "width": 4},
        "input": {"size": [32, 32], "intensity": "image"},
        "training": {"learning_rate": 0.1, "batch_size": 8, "local_epochs": 1},
        "privacy": {"mode": "none"},
        "members": [{"name": site} for site in SITES],
        **settings,
    }
    return validate(table, Study, source=Path("study.toml"))


def draw_counts(study: Study, num_images: int, seed: int, *, only_class: int | None = None):
    """Counts of a model that is right more often than not."""
    rng = torch.Generator().manual_seed(seed)
    num_classes = len(study.task.classes)
    shape = (num_images, num_classes) if study.task.labels == "multilabel" else (num_images,)
    high = 2 if study.task.labels == "multilabel" else num_classes
    targets = torch.randint(high, shape, generator=rng)
    if only_class is not None:
        targets = torch.full_like(targets, only_class)
    outputs = torch.randn(num_images, study.task.num_outputs, generator=rng)
    if study.task.labels == "multiclass":
        outputs += 1.5 * torch.nn.functional.one_hot(targets, num_classes)
    else:
        outputs += (2.0 * targets - 1).reshape(outputs.shape)
    return task_of(study).counts(outputs, targets)


def opened(study: Study, coordinator: str) -> Epoch:
    """An epoch of everybody, whose keys are not looked at."""
    keyed = [KeyedMember(name=site, key=f"{k:064x}") for k, site in enumerate(SITES)]
    opening = Opening(
        run="0" * 32, epoch=1, members=tuple(keyed), coordinator=coordinator,
        valid_from=0, valid_until=1, nonce="1" * 32,
    )  # fmt: skip
    schema, task = build_network(study).schema, task_of(study)
    manifest = plan_epoch(study, schema, task, opening, first_model="0" * 64)
    keys = tuple(bytes([k]) * 32 for k in range(len(SITES)))
    roster = Roster(manifest.digest(), keys, keys, keys, keys, keys, b"")
    return Epoch(manifest, roster, tuple(Agreement("", k, (), ()) for k in range(len(SITES))))


def speak(folder: Path, survivors_by_sum: list[tuple[str, ...]], masked) -> None:
    """The messages of such a run pass the coordinator, as far as a report looks at them."""

    def exchange(message: Message, replies: dict[str, Message]) -> None:
        answers = {site: lambda _, reply=reply: reply for site, reply in replies.items()}
        network = ObservedNetwork(LoopbackNetwork(answers), folder)
        assert len(list(network.ask(dict.fromkeys(replies, message), 60))) == len(replies)

    keys = SiteKeys("", 0, bytes(32), bytes(1184), bytes(16), bytes(600), bytes(70))
    exchange(Invitation("", b"", b""), dict.fromkeys(SITES, keys))
    exchange(Roster("", *[()] * 5, b""), dict.fromkeys(SITES, Agreement("", 0, (), ())))
    model = np.zeros(4, np.float32)
    for number, survivors in enumerate(survivors_by_sum):
        task = RoundTask("", number, 1, Purpose.TRAIN, (), "", (), (), b"", model)
        uploads = {
            site: Upload("", number, b"", (), (), masked())
            if site in survivors
            else Refusal("", Reason.BUSY)
            for site in SITES
        }
        exchange(task, uploads)
        if survivors != SITES:
            view = Survivors("", number, (), ())
            exchange(view, dict.fromkeys(survivors, Vote("", number, 0, b"")))
        request = Unmask("", number, *[()] * 7)
        exchange(request, dict.fromkeys(survivors, Shares("", number, 0, b"", (), ())))


def random_bodies():
    rng = np.random.default_rng(8)
    return lambda: np.frombuffer(rng.bytes(4096), np.uint8)


def make_run(
    path: Path,
    study: Study,
    simulation: Simulation | None = PHANTOMS,
    *,
    test_sites=SITES,
    masked=None,
    **drawn,
) -> Made:
    """A run of two rounds in which ``west`` missed the second, with drawn counts."""
    run_dir = RunDir.open(path, study, simulation, resume=False)
    network, task = build_network(study), task_of(study)
    model = network.vector()
    issue_identities(path, SITES)
    run_dir.save_epoch(opened(study, coordinator_of(path).fingerprint))
    speak(path, [SITES, MOST, SITES, test_sites], masked or random_bodies())
    counts = [draw_counts(study, 90, seed) for seed in range(3)]
    validation = [json.loads(json.dumps(task.figures(known))) for known in counts]
    survivors = [list(SITES), list(MOST)]
    agreed = {"convicted": {}, "disputes": []}
    for number in (1, 2):
        line = {
            "round": number,
            "sum": number - 1,
            "purpose": "train",
            "survivors": survivors[number - 1],
            "refusals": {} if number == 1 else {"west": "busy"},
            **agreed,
            "incoming_validation": validation[number - 1],
            "bytes_up": dict.fromkeys(survivors[number - 1], 40_000),
            "clipped": 0,
            "seconds": {"sites": 1.5, "sum": 0.01, "unmask": 0.02, "total": 1.75},
        }
        trained = model + np.float32(0.01 * number)
        state = State(number, number, trained, {}, (0,), 3, tuple(validation[:number]))
        run_dir.save(state, network.schema, line)
    for number, known in enumerate(counts):
        run_dir.save_counts(f"validation-{number:04d}", known)
    test = draw_counts(study, drawn.pop("num_images", 200), 7, **drawn)
    scored = {"bytes_up": dict.fromkeys(SITES, 8000), "seconds": {"total": 0.25}, **agreed}
    run_dir.save_evaluation("validation-0002", counts[2], {"survivors": list(SITES), **scored})
    run_dir.save_evaluation("test", test, {"survivors": list(test_sites), **scored})
    summary = {
        "study": {"name": study.name, "digest": study.digest()},
        "num_rounds": 2,
        "returned_round": 2,
        "sites": list(SITES),
        "survivors": survivors,
        "metrics": {"by_round": validation[1:], "final": task.figures(test)},
        "privacy": {},
        "wall_s": {"total": 4.0, "per_round": [1.75, 1.75]},
        "bytes_up_per_site": {**dict.fromkeys(MOST, 96_000), "west": 56_000},
        "num_params": network.schema.num_params,
        "final_model_sha256": run_dir.save_final(trained, network.schema, network.kept()),
    }
    run_dir.save_summary(summary)
    AuditLog(run_dir.path / AUDIT, utc_now).append("started")
    seal_again(path)
    return Made(path, study, summary)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Made:
    return make_run(tmp_path_factory.mktemp("runs") / "run", study_of())


@pytest.fixture
def copied(finished, tmp_path) -> Made:
    """The same run, free to be damaged."""
    ignored = shutil.ignore_patterns("report.*")
    shutil.copytree(finished.path, tmp_path / "run", ignore=ignored)
    return Made(tmp_path / "run", finished.study, finished.summary)


# What it says


def test_every_final_figure_is_shown_with_four_decimals(finished):
    text = finished.text
    for name in finished.study.task.figures:
        assert f"{finished.summary['metrics']['final'][name]:.4f}" in text


def test_the_privacy_statement_comes_before_any_figure(finished):
    text = finished.text
    assert text.index("No differential privacy:") < text.index("What was studied")
    assert text.index("left its site under masks") < text.index("What was studied")
    assert text.index("Simulated:") < text.index("What was studied")


def test_a_summary_with_epsilons_contradicts_a_study_without_privacy(finished):
    with pytest.raises(FederationError, match=r"summary\.json lists epsilons"):
        privacy_lines(finished.study, {"privacy": {"north": {"epsilon": 1.0}}})


def test_a_deployed_run_is_not_called_simulated(tmp_path):
    made = make_run(tmp_path / "run", study_of(), simulation=None)
    text = made.text
    assert "Deployed: 4 sites took part" in text
    assert "Simulated" not in text
    assert "Examples" not in text


def test_data_that_names_no_patients_is_said_so(tmp_path):
    data = {"name": "films", "format": "npz", "root": "/somewhere"}
    made = make_run(tmp_path / "run", study_of(), Simulation(num_sites=4, data=data))
    text = made.text
    assert "every image counts as a patient of its own" in text
    assert "/somewhere" not in (made.path / "report.json").read_text()


def test_sites_are_listed_with_rounds_and_bytes(finished):
    text = finished.text
    assert "north 2 of 2 0 96.0 kB" in text
    assert "west 1 of 2 1 56.0 kB" in text


def test_seconds_by_phase_add_up_to_the_whole_run(finished):
    seconds = finished.facts["seconds"]
    phases = sum(phase["total"] for phase in seconds["phases"].values())
    assert phases == pytest.approx(seconds["rounds"]["total"])
    assert phases + seconds["evaluations"] == pytest.approx(4.0)


def test_a_site_that_missed_the_final_evaluation_is_named(tmp_path, finished):
    assert "summed over all 4 sites" in finished.text
    made = make_run(tmp_path / "run", study_of(), None, test_sites=MOST)
    assert "summed over 3 sites" in made.text
    assert "west did not answer the final evaluation" in made.text


def test_few_test_images_of_a_class_are_warned_of(tmp_path, finished):
    assert "Few test images" not in finished.text
    made = make_run(tmp_path / "run", study_of(), num_images=40)
    weak = made.facts["weak_support"]
    assert weak
    assert all(images < 30 for images in weak.values())
    assert "Few test images" in made.text


# What the coordinator could see


def test_every_message_of_a_site_is_counted_from_the_runs_own_record(finished):
    lines = map(json.loads, (finished.path / "transcript.jsonl").read_text().splitlines())
    received = [line for line in lines if line["direction"] == "received"]
    shown = {message["kind"]: message for message in finished.facts["seen"]["messages"]}
    assert {kind: message["number"] for kind, message in shown.items()} == {
        "SiteKeys": 4, "Agreement": 4, "Upload": 15, "Vote": 3, "Shares": 15, "Refusal": 1,
    }  # fmt: skip
    assert sum(message["number"] for message in shown.values()) == len(received)
    by_field = [line["bytes"].values() for line in received if line["kind"] == "SiteKeys"]
    assert shown["SiteKeys"]["bytes"] == sum(map(sum, by_field)) == 4 * (8 + 32 + 1184 + 16 + 670)
    assert {message["clear_bytes"] for message in shown.values()} == {0}


def test_the_page_says_how_many_sums_the_coordinator_learned_and_over_how_many_sites(finished):
    seen, text = finished.facts["seen"], finished.text
    assert (seen["sums"], seen["fewest_sites_in_a_sum"], seen["votes"]) == (4, 3, 3)
    assert "The coordinator learned 4 sums, each over at least 3 sites" in text
    assert "by 3 signed votes in all" in text
    assert (seen["threshold"], seen["colluders"]) == (3, 1)
    assert "needed the help of 3 sites" in text


def test_masked_uploads_pass_the_test_of_their_bytes_and_plain_ones_fail_it(finished, tmp_path):
    found = finished.facts["seen"]["uniformity"]
    assert found["uploads"] == 15
    assert found["smallest"] > 1e-4
    plain = np.random.default_rng(2).normal(scale=300, size=1024).astype("<i4").view(np.uint8)
    made = make_run(tmp_path / "plain", study_of(), None, masked=lambda: plain)
    assert made.facts["seen"]["uniformity"]["median"] < 1e-12


def test_uploads_too_short_for_a_test_of_their_bytes_are_said_to_be(tmp_path):
    short = np.zeros(100, np.uint8)
    made = make_run(tmp_path / "run", study_of(), None, masked=lambda: short)
    assert made.facts["seen"]["uniformity"] is None
    assert "too short for a test" in made.text


def test_who_was_convicted_and_what_is_disputed_is_said(copied):
    path = copied.path / "rounds.jsonl"
    first, *rest = path.read_text().splitlines()
    line = json.loads(first)
    line |= {"convicted": {"west": "shared wrongly"}, "disputes": ["east and north"]}
    path.write_text("\n".join([json.dumps(line), *rest]) + "\n")
    copied.seal_again()
    assert "Left out by signed evidence: west (shared wrongly)." in copied.text
    assert "Disputes, of which nobody can say who is wrong: east and north." in copied.text


@pytest.mark.parametrize(
    ("loss", "named"),
    [
        ({"kind": "cross-entropy"}, "Mean cross-entropy, the quantity"),
        ({"kind": "focal", "focal_gamma": 1.5}, "Mean focal loss (gamma 1.5), the quantity"),
        ({"class_weights": [1, 3]}, "Mean class-weighted cross-entropy, the quantity"),
    ],
)
def test_the_loss_is_called_by_the_name_of_the_one_that_the_study_used(loss, named, tmp_path):
    training = {"learning_rate": 0.1, "batch_size": 8, "local_epochs": 1, "loss": loss}
    text = make_run(tmp_path / "run", study_of(training=training), None).text
    assert named in text
    assert ("classes weigh 1 (no lesion) and 3 (lesion)" in text) == ("class_weights" in loss)


def test_what_is_undefined_is_shown_as_not_defined(tmp_path):
    made = make_run(tmp_path / "run", study_of(), only_class=0)
    assert made.facts["test"]["auroc"] is None
    assert "AUROC not defined" in made.text


@pytest.mark.parametrize("labels", ["multiclass", "multilabel"])
def test_macro_figures_are_the_means_over_the_classes_shown(labels, tmp_path):
    made = make_run(tmp_path / "run", study_of(labels), simulation=None)
    test = made.facts["test"]
    for name in ("auroc", "precision", "recall"):
        shown = [entry[name] for entry in test["by_class"]]
        assert np.mean(shown) == pytest.approx(test[name])
    assert made.page.count('aria-label="ROC curve"') == len(KINDS[labels])


def test_a_large_confusion_matrix_is_drawn(tmp_path):
    classes = [f"class {k}" for k in range(14)]
    made = make_run(tmp_path / "run", study_of("multiclass", classes), None, num_images=2000)
    page = made.page
    assert 'aria-label="Confusion matrix as shares of each row"' in page
    assert 'class="matrix' not in page


def test_one_against_rest_tables_of_many_classes_hold_every_image():
    study = study_of("multiclass")
    counts = draw_counts(study, 300, 1)
    confusion = np.array(task_of(study).figures(counts)["confusion"])
    for k, entry in enumerate(figures_by_class(study, counts)):
        negatives = np.delete(confusion, k, axis=0)
        assert entry["images"] == {study.task.classes[k]: confusion[k].sum()}
        assert entry["specificity"] == np.delete(negatives, k, axis=1).sum() / negatives.sum()


def test_names_of_classes_are_text_and_never_markup(tmp_path):
    classes = ("<b>no</b>", "$x$ & <script>")
    page = make_run(tmp_path / "run", study_of(classes=classes), None).page
    assert "<script" not in page
    assert "$x$ &amp; &lt;script&gt;" in page


# The files


def test_equal_folders_give_equal_reports(finished):
    first = finished.page, json.dumps(finished.facts)
    again = write_report(finished.path).read_text()
    assert (again, json.dumps(finished.facts)) == first


def test_the_page_loads_nothing(finished):
    page = finished.page
    assert not re.findall(r"<(?:script|link|iframe|img)\b", page)
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "url(http" not in page
    assert "default-src 'none'" in page


def test_a_report_leaves_the_digests_of_the_run_as_they_were(finished):
    before = digests_of(RunDir(finished.path))
    assert finished.page
    assert verify(finished.path).num_files == len(before)


@pytest.mark.parametrize(
    "name",
    [
        "summary.json", "study.toml", "counts/test.npy", "final.safetensors", "rounds.jsonl",
        "transcript.jsonl",
    ],
)  # fmt: skip
def test_a_report_is_refused_when_a_file_it_reads_has_changed(name, copied):
    (copied.path / name).write_bytes((copied.path / name).read_bytes() + b" ")
    with pytest.raises(FederationError, match=f"^{re.escape(name)} differs"):
        write_report(copied.path)


def test_verify_names_a_model_that_has_changed(copied):
    path = copied.path / "models" / "round-0001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FederationError, match=r"^models/round-0001\.safetensors differs"):
        verify(copied.path)


def test_verify_names_a_file_that_is_missing(copied):
    (copied.path / "counts" / "validation-0001.npy").unlink()
    with pytest.raises(FederationError, match=r"^counts/validation-0001\.npy is missing"):
        verify(copied.path)


def test_a_list_that_leaves_the_results_out_verifies_nothing(copied):
    (copied.path / "SHA256SUMS").write_text("")
    with pytest.raises(FederationError, match=r"^study\.toml is not listed in SHA256SUMS"):
        verify(copied.path)


def test_a_list_that_is_no_list_is_named(copied):
    (copied.path / "SHA256SUMS").write_text("d41d8  study.toml\n")
    with pytest.raises(FederationError, match=r"^SHA256SUMS: line 1"):
        verify(copied.path)


def change(summary: dict, path: str, value: object) -> None:
    *sections, last = path.split(".")
    for section in sections:
        summary = summary[int(section) if section.isdigit() else section]
    summary[last] = value


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("metrics.final.auroc", 0.99, r"auroc \(test\) is 0\.99, counts/test\.npy gives"),
        ("metrics.by_round.0.loss", 0.1, r"loss \(validation-0001\) is 0\.1"),
        ("metrics.by_round", [], r"the length of metrics\.by_round is 0, rounds\.jsonl gives 2"),
        ("bytes_up_per_site.north", 1, r"bytes_up_per_site is .* evaluations\.jsonl gives"),
        ("num_params", 5, r"num_params is 5, models/ gives"),
        ("final_model_sha256", "0" * 64, r"final_model_sha256 is 000"),
        ("survivors", [list(SITES)] * 2, r"survivors is .* rounds\.jsonl gives"),
        ("study.digest", "0" * 64, r"study\.digest is 000.* study\.toml gives"),
        ("sites", ["north"], r"sites is \['north'\], the manifests give"),
        ("returned_round", 1, r"final\.safetensors: .* is not what models/ gives for round 1"),
    ],
)
def test_a_summary_that_disagrees_with_the_other_files_is_refused(path, value, named, copied):
    summary = json.loads(json.dumps(copied.summary))
    change(summary, path, value)
    RunDir(copied.path).save_summary(summary)
    copied.seal_again()
    for act in (write_report, verify):
        with pytest.raises(FederationError, match=named):
            act(copied.path)
    assert not (copied.path / "report.html").exists()


def test_an_unfinished_run_has_no_report(tmp_path):
    RunDir.open(tmp_path / "run", study_of(), PHANTOMS, resume=False)
    with pytest.raises(ConfigError, match=r"0 of 2 rounds .* --resume"):
        write_report(tmp_path / "run")


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match="is not a run folder"):
        write_report(tmp_path / "nowhere")


# Examples


def test_examples_are_phantoms_of_no_site_with_and_without_a_lesion(finished):
    examples = finished.facts["examples"]
    assert [example["class"] for example in examples] == ["lesion", "no lesion"] * 4
    assert [example["site"] for example in examples[::2]] == list(SITES)
    assert all(example["patient"] >= 1_000_000 for example in examples)
    assert all(0 < example["probability"] < 1 for example in examples)


@pytest.mark.parametrize("intensity", ["dtype", "image"])
def test_phantoms_are_prepared_as_a_site_prepares_them(intensity):
    config = Input(size=(32, 32), intensity=intensity, mean=0.4, std=0.3)
    phantoms = draw_patient(0, 0, 1, scanner=scanner_of_site(0, 0), size=32, num_images=3)
    stored = np.stack([np.rint(p.image * 255).astype(np.uint8)[None] for p in phantoms])
    torch.testing.assert_close(prepare_phantoms(phantoms, config), prepare(stored, config))


def test_the_phantoms_seed_is_the_sites_default():
    assert PhantomData(name="phantoms", format="phantom").seed == PHANTOM_SEED


# The command


def call(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fl-report", *arguments])
    with pytest.raises(SystemExit) as ended:
        report_cli.main()
    return int(ended.value.code or 0)


def test_a_first_word_that_is_no_subcommand_is_a_run_folder(finished, monkeypatch, capsys):
    assert call(monkeypatch, str(finished.path)) == 0
    assert capsys.readouterr().out.strip() == str(finished.path / "report.html")


def test_verify_says_how_many_files_it_checked(finished, monkeypatch, capsys):
    assert call(monkeypatch, "verify", str(finished.path)) == 0
    num_files = len(digests_of(RunDir(finished.path)))
    assert capsys.readouterr().out.startswith(f"verified: {num_files} files, ")


def test_verify_exits_1_and_names_the_file(copied, monkeypatch, capsys):
    (copied.path / "rounds.jsonl").write_text("")
    assert call(monkeypatch, "verify", str(copied.path)) == 1
    assert "rounds.jsonl differs" in capsys.readouterr().err


def test_a_missing_folder_exits_2(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, str(tmp_path / "verfy")) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_help_shows_both_ways(monkeypatch, capsys):
    assert call(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert "fl-report [OPTIONS] RUN_DIR | COMMAND" in shown
    assert "verify" in shown
