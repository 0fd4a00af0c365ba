"""What headers say over a whole data set: spacing, orientation, and fields that name a person.

Lines count fields and files; what a field holds is never read out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from client.finding import Finding, ok, warning
from client.readers.volume import Header
from common.study import Study

MAX_NAMED = 5
SIMILAR = 0.01  # spacings that differ by less, as a share, are one
VOLUME_DIMS = 3


@dataclass
class Headers:
    """Private. What the headers of all images have in common, and what not."""

    spacings: Counter[tuple[float, ...] | None] = field(default_factory=Counter)
    orientations: Counter[str] = field(default_factory=Counter)
    identifiers: Counter[str] = field(default_factory=Counter)  # images, by name of the field

    def note(self, header: Header) -> None:
        """Add one image's."""
        self.identifiers.update(header.identifiers)
        if header.orientation:
            self.orientations[header.orientation] += 1
        self.spacings[self._known(header.spacing)] += 1

    def _known(self, spacing: tuple[float, ...] | None) -> tuple[float, ...] | None:
        """The spacing that was seen before and is hardly different, or this one."""
        if spacing is None:
            return None
        for other in self.spacings:
            if other is not None and len(other) == len(spacing):
                pairs = zip(spacing, other, strict=True)
                if all(abs(a - b) <= SIMILAR * b for a, b in pairs):
                    return other
        return spacing


def check_headers(headers: Headers, study: Study | None) -> Iterator[Finding]:
    """One line for each thing that headers can say; none where no file has a header."""
    if headers.spacings:
        yield _check_spacing(headers, study)
    if headers.orientations:
        named = ", ".join(f"{name} ({num})" for name, num in headers.orientations.most_common())
        several = "; all are turned the same way" if len(headers.orientations) > 1 else ""
        yield ok(f"orientation of the files' axes: {named}{several}")
    if headers.identifiers:
        named = ", ".join(f"{name} ({num})" for name, num in sorted(headers.identifiers.items()))
        yield warning(
            f"headers hold what may name a person, by number of images: {named}; nothing of it "
            "leaves this site; fl-client check --deidentified FOLDER writes a copy without"
        )


def _check_spacing(headers: Headers, study: Study | None) -> Finding:
    most = headers.spacings.most_common(MAX_NAMED)
    named = ", ".join(f"{_in_mm(spacing)} ({num})" for spacing, num in most)
    others = len(headers.spacings) - len(most)
    text = f"spacing: {named}{f' and {others} others' if others else ''}"
    wanted = study.input.spacing if study else None
    if wanted is not None:
        return ok(f"{text}; the study resamples to {_in_mm(wanted)}")
    if len(headers.spacings) == 1:
        return ok(text)
    return warning(
        f"{text}: the network would see one organ in several sizes; ask the coordinator for "
        "input.spacing in the study"
    )


def _in_mm(spacing: tuple[float, ...] | None) -> str:
    return " x ".join(f"{side:.3g}" for side in spacing) + " mm" if spacing else "not said"
