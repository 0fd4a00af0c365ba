"""A report of every kind of study."""

from __future__ import annotations

import pytest
from federation import TABLE, federate, tiny_study

from server.report import verify, write_report


@pytest.mark.parametrize(
    "changes",
    [
        {
            "model": {"name": "multimodal", "image": {"name": "cnn", "width": 4}},
            "table": {"columns": [{"name": "age", "kind": "number", "mean": 50, "std": 10}]},
        },
        {
            "model": {"name": "logistic"},
            "input": {"size": []},
            "table": {"columns": [{"name": "age", "kind": "number"}]},
        },
        {"training": {**TABLE["training"], "local_normalisation": True}},
        {"training": {**TABLE["training"], "control_variates": True}},
    ],
    ids=["film and record", "record alone", "FedBN", "SCAFFOLD"],
)
def test_every_kind_of_study_has_a_report_that_verifies(changes, tmp_path):
    federate(tiny_study(3, num_rounds=1, **changes), tmp_path)
    page = write_report(tmp_path).read_text()
    verify(tmp_path)
    assert ("Phantoms that no site had" in page) == ("control_variates" in str(changes))
