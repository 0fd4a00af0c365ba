"""Clinical columns: cells to numbers, alone and beside an image, through training and scoring."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.linear_model
import sklearn.metrics
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_breast_cancer

from client.augment import augment
from client.clinical import EMPTY, Forms, count_empty, features_of
from client.config import CsvData
from client.dataset import load_site_data
from client.evaluate import predictions
from client.readers import read_cases
from client.readers.case import Wanted
from client.readers.csv import read_rows
from client.train import batches, train
from common.config import validate
from common.errors import ConfigError, DataError
from common.models.build import build_network, row_shape
from common.models.tabular import pack, unpack
from common.phantom import draw_patient, has_lesions, scanner_of_site
from common.phantom_record import draw_record
from common.study import Augmentation, Study, Table
from common.tasks import task_of

COLUMNS: list[dict[str, Any]] = [
    {"name": "age", "kind": "number", "mean": 50, "std": 10, "low": 0, "high": 120},
    {"name": "sex", "kind": "category", "values": ["f", "m"]},
    {"name": "seen", "kind": "date", "origin": "2020-01-01", "days": 100},
]
ROW = {"age": "65", "sex": "m", "seen": "2020-02-20", "more": "nobody asks"}
NAME = "Kowalczyk"
TABULAR = {
    "table": {"columns": COLUMNS},
    "model": {"name": "mlp", "hidden": [8]},
    "input": {"size": []},
}
MIXED = {
    "table": {"columns": COLUMNS},
    "model": {"name": "multimodal", "image": {"name": "cnn", "width": 4}},
    "input": {"size": [16, 12]},
}


def table_of(missing: str = "refuse") -> Table:
    return validate({"columns": COLUMNS, "missing": missing}, Table, source=Path("study.toml"))


def numbers(
    row: dict[str, str], missing: str = "refuse", forms: Forms | None = None
) -> list[float]:
    found = features_of(row, table_of(missing), forms or Forms(), "t.csv, line 2")
    assert found.dtype == np.float32
    assert found.shape == (table_of(missing).num_features,)
    return found.tolist()


def test_a_row_becomes_the_numbers_that_the_study_says() -> None:
    assert numbers(ROW) == [1.5, 0, 1, 0.5]


def test_an_empty_cell_is_zero_and_marked() -> None:
    row = {**ROW, "age": "", "sex": "NA"}
    assert numbers(row, "indicator") == [0, 0, 0, 0.5, 1, 1, 0]
    assert numbers(ROW, "indicator") == [1.5, 0, 1, 0.5, 0, 0, 0]
    assert count_empty(row, table_of()) == ["age", "sex"]


@pytest.mark.parametrize("cell", sorted(EMPTY))
def test_what_hospitals_write_for_nothing_is_nothing(cell: str) -> None:
    for written in (cell, cell.upper(), f" {cell} "):
        assert numbers({**ROW, "age": written}, "indicator")[:1] == [0]


@given(st.floats(0, 120).map(lambda value: round(value, 3)))
def test_numbers_with_a_comma_are_the_same(value: float) -> None:
    with_comma = {**ROW, "age": f"{value}".replace(".", ",")}
    assert numbers(with_comma, forms=Forms(decimal=",")) == numbers({**ROW, "age": f"{value}"})


def test_a_date_may_have_another_form() -> None:
    assert numbers({**ROW, "seen": "20.2.2020"}, forms=Forms(date="%d.%m.%Y")) == numbers(ROW)


REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "an empty cell": ({"age": ""}, "column 'age' is empty"),
    "no number": ({"age": NAME}, "column 'age' holds no number"),
    "a comma": ({"age": "6,5"}, r'holds no number; correct it, or set data\.decimal = ","'),
    "infinity": ({"age": "inf"}, "holds no number"),
    "an underscore": ({"age": "1_0"}, "holds no number"),
    "another unit": ({"age": "780"}, r"outside the study's range, 0\.0 to 120\.0"),
    "below the range": ({"age": "-1"}, "is it in another unit"),
    "no value of the study": ({"sex": NAME}, "none of the study's values: f, m"),
    "another case": ({"sex": "M"}, "none of the study's values"),
    "another form of date": ({"seen": "20.02.2020"}, "holds no date of the form %Y-%m-%d"),
    "a day that is none": ({"seen": "2021-02-29"}, r"set data\.date_format to it"),
}


@pytest.mark.parametrize("title", REFUSED)
def test_what_cannot_be_read_is_refused_by_line_and_column_and_never_shown(title: str) -> None:
    changes, message = REFUSED[title]
    with pytest.raises(DataError, match=message) as caught:
        numbers({**ROW, **changes})
    assert str(caught.value).startswith("t.csv, line 2: ")
    assert NAME not in str(caught.value)


def test_a_column_that_the_study_reads_must_be_there() -> None:
    row = {name: cell for name, cell in ROW.items() if name != "sex"}
    with pytest.raises(DataError, match="no column 'sex', which the study reads"):
        numbers(row)


# Files


def write_table(root: Path, num: int = 60) -> CsvData:
    rng = np.random.default_rng(3)
    lines = ["age,sex,seen,ill,who"]
    for k in range(num):
        ill = int(rng.integers(2))
        age = rng.normal(65 if ill else 45, 8)
        lines.append(f"{age:.1f},{'fm'[k % 2]},2021-03-{1 + k % 28:02d},{ill},p{k // 2}")
    (root / "t.csv").write_text("\n".join(lines) + "\n")
    table = {"name": "wards", "format": "csv", "root": str(root), "table": "t.csv"}
    keys = {"target": "ill", "patient": "who"}
    return validate({**table, **keys}, CsvData, source=root / "site.toml")


@pytest.fixture
def tabular(make_study: Callable[..., Study]) -> Study:
    return make_study({**TABULAR, "task": {"kind": "classification", "classes": ["0", "1"]}})


def test_a_table_without_images_is_trained_on(tmp_path: Path, tabular: Study) -> None:
    data = load_site_data(write_table(tmp_path), tabular)
    assert data.train.table is not None  # type: ignore[union-attr]
    pixels, targets = data.train.part(slice(0, 7))  # type: ignore[union-attr]
    assert pixels.shape == (7, *row_shape(tabular)) == (7, 4)
    assert targets.shape == (7,)
    network, task = build_network(tabular), task_of(tabular)
    training = tabular.training.model_copy(update={"local_epochs": 60})
    update = train(
        network.vector(),
        data.train,
        training,
        network=network,
        task=task,
        rate=0.3,
        rng=torch.Generator().manual_seed(1),
    )
    network.load(build_network(tabular).vector() + update.values)
    counts = sum(task.counts(*batch) for batch in predictions(data.train, network))
    assert task.figures(counts)["auroc"] > 0.85  # type: ignore[arg-type]


def test_patients_that_are_alike_are_different_people(tmp_path: Path, tabular: Study) -> None:
    data = write_table(tmp_path)
    unnamed = data.model_copy(update={"patient": None})
    named = load_site_data(data, tabular).contents
    assert len(named.units) == 30
    assert len(load_site_data(unnamed, tabular).contents.units) == 60


def test_the_contents_change_with_a_cell(tmp_path: Path, tabular: Study) -> None:
    data = write_table(tmp_path)
    before = load_site_data(data, tabular).contents.digest
    path = tmp_path / "t.csv"
    path.write_text(path.read_text().replace(",f,", ",m,", 1))
    assert load_site_data(data, tabular).contents.digest != before


def test_other_formats_have_no_clinical_columns(tmp_path: Path, tabular: Study) -> None:
    from client.config import NpzData

    data = NpzData(name="scans", format="npz", root=tmp_path / "a.npz")
    with pytest.raises(DataError, match=r'set data\.format = "csv"'):
        read_cases(data, Wanted.by(tabular))


# Beside images


def test_packed_rows_are_taken_apart_again() -> None:
    pixels, table = torch.randn(5, 2, 4, 3), torch.randn(5, 7)
    apart = unpack(pack(pixels, table), (2, 4, 3))
    assert torch.equal(apart[0], pixels)
    assert torch.equal(apart[1], table)
    assert torch.equal(pack(torch.empty(5, 0), table), table)


def test_image_and_table_of_one_patient_stay_together(make_study: Callable[..., Study]) -> None:
    study = make_study(
        {
            **MIXED,
            "table": {"columns": [{"name": "age", "kind": "number"}]},
            "training.augmentation": {"flip": 1.0},
        }
    )
    from client.images import Images

    values = torch.arange(20.0)
    pixels = values.reshape(20, 1, 1, 1).expand(20, 1, 16, 12).contiguous()
    images = Images(pixels, torch.arange(20), tuple("a" * 20), table=values[:, None])
    seen = 0
    for rows, targets in batches(images, study.training, torch.Generator().manual_seed(2)):
        shown, table = unpack(rows, (1, 16, 12))
        assert torch.allclose(shown.amax(dim=(1, 2, 3)), targets.float(), atol=1e-3)
        assert torch.equal(table[:, 0], targets.float())
        seen += len(rows)
    assert seen == 20
    assert augment(pixels, targets, Augmentation(), torch.Generator())[0] is pixels


def test_both_the_image_and_the_table_decide(make_study: Callable[..., Study]) -> None:
    study = make_study(MIXED)
    network = build_network(study)
    pixels, table = torch.randn(3, 1, 16, 12), torch.randn(3, study.table.num_features)  # type: ignore[union-attr]
    logits = network(pack(pixels, table))
    assert logits.shape == (3, 1)
    assert not torch.allclose(logits, network(pack(pixels, table + 1)))
    assert not torch.allclose(logits, network(pack(pixels.flip(0), table)))


def test_a_study_without_images_and_columns_is_none(make_study: Callable[..., Study]) -> None:
    with pytest.raises(ConfigError, match="looks at images: give"):
        make_study({"input": {"size": []}})


# Phantoms and real data


def test_a_record_is_of_the_patient_on_the_film() -> None:
    ill = []
    for patient in range(60):
        scanner = scanner_of_site(0, 1)
        film = draw_patient(0, 1, patient, scanner=scanner, size=64, num_images=1)[0]
        known = has_lesions(0, 1, patient, scanner.prevalence)
        assert known == bool(film.label)
        record = draw_record(0, 1, patient, prevalence=scanner.prevalence)
        assert record == draw_record(0, 1, patient, prevalence=scanner.prevalence)
        ill.append((known, float(record["age"])))
    ages = [np.mean([age for k, age in ill if k == kind]) for kind in (True, False)]
    assert ages[0] > ages[1] + 5


def test_logistic_regression_on_real_data_is_that_of_scikit_learn(
    make_study: Callable[..., Study], tmp_path: Path
) -> None:
    """Wisconsin diagnostic breast cancer (569 patients), which comes with scikit-learn."""
    found = load_breast_cancer()
    names = [str(name).replace(" ", "_") for name in found.feature_names]
    means, stds = found.data.mean(axis=0), found.data.std(axis=0)
    columns = [
        {"name": name, "kind": "number", "mean": float(mean), "std": float(std)}
        for name, mean, std in zip(names, means, stds, strict=True)
    ]
    part = np.array(["train", "val", "test"])[np.arange(569) % 5 // 2]
    rows = [
        ",".join([*map(str, values), ("malignant", "benign")[label], split])
        for values, label, split in zip(found.data, found.target, part, strict=True)
    ]
    (tmp_path / "t.csv").write_text("\n".join([",".join([*names, "kind", "part"]), *rows]))
    table = {"name": "breast", "format": "csv", "root": str(tmp_path), "table": "t.csv"}
    keys = {"target": "kind", "split": "part"}
    data = validate({**table, **keys}, CsvData, source=tmp_path / "site.toml")
    study = make_study(
        {
            "table": {"columns": columns},
            "model": {"name": "logistic"},
            "input": {"size": []},
            "task": {"kind": "classification", "classes": ["malignant", "benign"]},
            "training": {"learning_rate": 0.5, "batch_size": 512, "local_epochs": 400},
        }
    )
    site = load_site_data(data, study)
    network, task = build_network(study), task_of(study)
    update = train(
        network.vector(),
        site.train,
        study.training,
        network=network,
        task=task,
        rate=0.5,
        rng=torch.Generator().manual_seed(1),
    )
    network.load(network.vector() * 0 + update.values)
    counts = sum(task.counts(*batch) for batch in predictions(site.test, network))
    scaled = (found.data - means) / stds
    theirs = sklearn.linear_model.LogisticRegression(C=100, max_iter=5000)
    theirs.fit(scaled[part == "train"], found.target[part == "train"])
    scores = theirs.decision_function(scaled[part == "test"])
    expected = sklearn.metrics.roc_auc_score(found.target[part == "test"], scores)
    assert task.figures(counts)["auroc"] == pytest.approx(expected, abs=0.02)  # type: ignore[arg-type]
    assert expected > 0.95


# What a reviewer found


def test_a_value_of_the_study_is_one_even_where_others_write_it_for_nothing() -> None:
    columns = [{"name": "pain", "kind": "category", "values": ["none", "mild"]}]
    table = validate({"columns": columns}, Table, source=Path("study.toml"))
    assert features_of({"pain": "none"}, table, Forms(), "t").tolist() == [1, 0]
    assert count_empty({"pain": "none"}, table) == []
    assert count_empty({"pain": "n/a"}, table) == ["pain"]


def test_a_number_that_no_float_holds_is_refused() -> None:
    columns = [{"name": "crp", "kind": "number", "std": 1e-30}]
    table = validate({"columns": columns}, Table, source=Path("study.toml"))
    with pytest.raises(DataError, match="too large once it is scaled"):
        features_of({"crp": "1e20"}, table, Forms(), "t.csv, line 2")


@pytest.mark.parametrize("form", ["%d.%d.%Y", "%d.%m.", "%H:%M", "%Y", "day", "%Q"])
def test_a_form_that_is_no_date_is_refused(form: str, tmp_path: Path) -> None:
    table = {"name": "wards", "format": "csv", "root": str(tmp_path), "table": "t.csv"}
    with pytest.raises(ConfigError, match="needs day, month and year"):
        validate({**table, "date_format": form}, CsvData, source=tmp_path / "site.toml")


@pytest.mark.parametrize("kind", ["name", "value"])
def test_spaces_around_what_is_looked_for_are_refused(kind: str) -> None:
    column: dict[str, Any] = {"name": "sex", "kind": "category", "values": ["f", "m"]}
    column |= {"name": " sex"} if kind == "name" else {"values": ["f", "m "]}
    with pytest.raises(ConfigError):
        validate({"columns": [column]}, Table, source=Path("study.toml"))


def test_equal_features_of_other_cells_are_other_people(tmp_path: Path, tabular: Study) -> None:
    data = write_table(tmp_path).model_copy(update={"patient": None})
    path = tmp_path / "t.csv"
    header, first, *_ = path.read_text().splitlines()
    rows = [f"{first},{k}" for k in range(20)]
    path.write_text("\n".join([f"{header},bed", *rows]) + "\n")
    assert len(load_site_data(data, tabular).contents.units) == 20


def test_a_table_without_a_header_shows_no_patient(tmp_path: Path, tabular: Study) -> None:
    data = write_table(tmp_path)
    path = tmp_path / "t.csv"
    path.write_text(f"1947-03-02,f,{NAME},12.4\n" + path.read_text())
    with pytest.raises(DataError, match="no column 'ill' in its first line") as caught:
        load_site_data(data, tabular)
    assert NAME not in str(caught.value)


def test_a_separator_is_the_one_that_gives_rows_of_one_width(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("age;crp, mg/l, x, y;ill\n41;2;0\n63;19;1\n")
    table = {"name": "wards", "format": "csv", "root": str(tmp_path), "table": "t.csv"}
    data = validate({**table, "target": "ill"}, CsvData, source=tmp_path / "site.toml")
    rows = read_rows(data, images=False)
    assert list(rows[0][1]) == ["age", "crp, mg/l, x, y", "ill"]
