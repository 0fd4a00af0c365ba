"""Generated clinical records, to go with generated images or alone. No patient stands behind them.

A patient with lesions is older on average, smokes more often and has more C-reactive protein; no
column tells it for certain. The day of admission tells nothing.
"""

from __future__ import annotations

from datetime import date, timedelta

import numpy as np

from common.phantom import has_lesions

COLUMNS = ("age", "sex", "smoking", "crp", "admitted")
SEXES = ("female", "male")
SMOKING = ("never", "former", "current")
UNKNOWN_CRP = 0.1  # share of patients whose value is missing
FIRST_DAY = date(2019, 1, 1)
_RECORD = 12  # a stream of its own


def draw_record(
    seed: int, site_index: int, patient_index: int, *, prevalence: float
) -> dict[str, str]:
    """The cells of one patient by column, as a hospital's table would have them.

    Args:
      seed: Of the whole federation of phantoms.
      site_index: From 0.
      patient_index: From 0, within the site.
      prevalence: Share of the site's patients with lesions.

    Guarantees:
      Equal arguments give equal records; lesions are those of the patient's films.
    """
    ill = has_lesions(seed, site_index, patient_index, prevalence)
    sequence = np.random.SeedSequence((seed, site_index, patient_index), spawn_key=(_RECORD,))
    rng = np.random.default_rng(sequence)
    age = np.clip(rng.normal(64 if ill else 51, 13), 18, 96)
    sex = SEXES[int(rng.integers(2))]
    smoking = SMOKING[int(rng.choice(3, p=(0.25, 0.35, 0.4) if ill else (0.5, 0.3, 0.2)))]
    crp = rng.lognormal(np.log(14 if ill else 5), 0.9)
    known = rng.random() >= UNKNOWN_CRP
    admitted = FIRST_DAY + timedelta(days=int(rng.integers(5 * 365)))
    cells = (f"{age:.0f}", sex, smoking, f"{crp:.1f}" if known else "", admitted.isoformat())
    return dict(zip(COLUMNS, cells, strict=True))
