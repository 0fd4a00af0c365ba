"""What names a patient stays where it is: it is in nothing that a run writes, says or sends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import tomli_w
from scanner import BIRTH, NAME, write_dicom

ROOT = Path(__file__).parents[1]
CLASSES = ["no lesion", "lesion"]
NUM = 60
STUDY = {
    "name": "clinics",
    "num_rounds": 2,
    "task": {"kind": "classification", "labels": "binary", "classes": CLASSES},
    "model": {"name": "cnn", "width": 4},
    "input": {"size": [16, 16], "intensity": "window", "window": [0, 255]},
    "training": {"learning_rate": 0.5, "batch_size": 8, "local_epochs": 1},
    "privacy": {"mode": "none"},
}


def test_a_run_on_dicom_files_writes_and_says_no_identifier(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(NUM):
        name = CLASSES[number % 2]
        pixels = rng.integers(0, 120 + 60 * (number % 2), (18, 16), dtype=np.uint8)
        patient = f"MRN-4711-{number:02d}"
        path = tmp_path / "scans" / name / f"{number:03d}.dcm"
        write_dicom(path, pixels, PatientID=patient, StudyDescription=f"for {NAME}")
    study = tmp_path / "clinics.toml"
    study.write_text(tomli_w.dumps(STUDY))
    data = {"name": "scans", "format": "dicom", "root": "scans"}
    (tmp_path / "clinics.site.toml").write_text(tomli_w.dumps({"data": data}))
    command = ["scripts/simulate", "--study", str(study), "--sites", "3"]
    done = subprocess.run(
        [sys.executable, *command, "--run-dir", str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    names = "\n".join(map(str, files)).encode()
    everything = b"".join(path.read_bytes() for path in files) + names + done.stdout + done.stderr
    assert (tmp_path / "run" / "final.safetensors") in files
    secrets = (NAME, NAME.split("^", maxsplit=1)[0], BIRTH, "MRN-4711")
    assert [secret for secret in secrets if secret.encode() in everything] == []
