"""Whether this site's books still hold what it stated about them, however that came back."""

from __future__ import annotations

from collections.abc import Callable

from common.errors import DataError

SHORT = 12  # digits of a head

Holds = Callable[[str], bool]


def check_heads(
    audit_holds: Holds, audit: str, ledger_holds: Holds, ledger: str, which: str
) -> None:
    """Refuse books that lack a head.

    Args:
      audit_holds: Whether a head is in the audit log.
      audit: What was stated of it.
      ledger_holds: Whether a head is in any ledger: studies may have used different ones.
      ledger: What was stated of one.
      which: Statement the heads are of.

    Raises:
      DataError: R6. Lines were cut off, or an older copy was put back.
    """
    for book, holds, head in (
        ("audit log", audit_holds, audit),
        ("ledger", ledger_holds, ledger),
    ):
        if not holds(head):
            raise DataError(
                f"the {book} does not hold the head {head[:SHORT]}... {which}: lines were cut off, "
                "or an older copy was put back; restore the newest",
                rule="R6",
            )
