"""A finished run folder and what a report makes of it."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from sealed import seal_again

from common.tasks import task_of
from server.report import write_report
from server.reporting.overlays import EXAMPLE
from server.run_dir import RunDir


def words_of(page: str) -> str:
    """What a person reads of a page."""
    body = re.sub(r"<svg.*?</svg>", "", page[page.index("<body>") :], flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


@dataclass
class Run:
    """A finished run folder and what a report makes of it."""

    path: Path

    @property
    def page(self) -> str:
        return write_report(self.path).read_text()

    @property
    def text(self) -> str:
        """What a person reads."""
        return words_of(self.page)

    @property
    def facts(self) -> dict:
        write_report(self.path)
        return json.loads((self.path / "report.json").read_text())

    @property
    def pictures(self) -> list[np.ndarray]:
        """The raster pictures of the page in their order, each (height, width, 3)."""
        return [np.array(decoded(uri)) for uri in re.findall(r'<img src="([^"]+)"', self.page)]

    def copied_to(self, folder: Path) -> Run:
        """The same run without its report, free to be changed."""
        shutil.copytree(self.path, folder, ignore=shutil.ignore_patterns("report.*"))
        return Run(folder)

    def keep(self, site: str, image, mask, predicted) -> None:
        arrays = {"image": image, "mask": mask, "predicted": predicted}
        arrays = {name: np.array(array, np.uint8) for name, array in arrays.items()}
        np.savez_compressed(self.path / "sites" / site / EXAMPLE, **arrays)

    def count(self, *, num_images: int, right, predicted, actual) -> None:
        """Replace what the test split gave, as if the run had counted this."""
        apart, compared = [0] * len(right), [0] * len(right)
        numbers = [num_images, 0, *right, *predicted, *actual, *apart, *compared]
        numbers += [0] * 3 * len(right)
        self.count_again(np.array(numbers, np.int64))

    def count_again(self, counts: np.ndarray) -> None:
        """Replace what the test split gave by these counts."""
        run_dir = RunDir(self.path)
        summary = run_dir.summary()
        summary["metrics"]["final"] = task_of(run_dir.study()).figures(counts)
        run_dir.save_counts("test", counts)
        run_dir.save_summary(summary)
        seal_again(self.path)

    def deploy(self) -> None:
        """Make it the record of a run in which no site was simulated."""
        (self.path / "simulation.toml").unlink()
        seal_again(self.path)


def decoded(uri: str) -> Image.Image:
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"), validate=True)
    return Image.open(io.BytesIO(content)).convert("RGB")
