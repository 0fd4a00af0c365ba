"""The tree of errors: each class says whose move it is, and the command line ends with its code."""

import re
from collections.abc import Iterator

import pytest

from common import errors
from common.cli import start
from common.errors import FederationError

EXIT_CODES = {
    "ConfigError": 2,
    "DataError": 3,
    "BudgetExhausted": 4,
    "ProtocolError": 5,
    "LocalProtocolError": 5,
    "RemoteProtocolError": 5,
    "VersionMismatch": 5,
    "PolicyError": 6,
    "RoundAborted": 7,
    "DiskFull": 8,
}
CHILDREN_OF_PROTOCOL_ERROR = {"LocalProtocolError", "RemoteProtocolError"}
PARENTS = {
    name: "ProtocolError" if name in CHILDREN_OF_PROTOCOL_ERROR else "FederationError"
    for name in EXIT_CODES
} | {"VersionMismatch": "RemoteProtocolError"}


def tree(root: type[FederationError] = FederationError) -> Iterator[type[FederationError]]:
    for child in root.__subclasses__():
        yield child
        yield from tree(child)


every_error = pytest.mark.parametrize("error", list(tree()), ids=lambda error: error.__name__)


def test_the_tree_is_the_one_that_the_operators_guide_shows() -> None:
    assert {e.__name__: e.__bases__[0].__name__ for e in tree()} == PARENTS


@every_error
def test_a_class_has_the_exit_code_of_the_table(error: type[FederationError]) -> None:
    assert error.exit_code == EXIT_CODES[error.__name__]


@pytest.mark.parametrize("error", [FederationError, *tree()], ids=lambda error: error.__name__)
def test_a_class_says_what_happened_and_who_acts(error: type[FederationError]) -> None:
    summary, *_ = vars(error)["__doc__"].splitlines()
    for sentence in (summary, vars(error)["who_acts"]):
        assert re.fullmatch(r"[A-Z][^\n]+\.", sentence)


@every_error
def test_a_broken_rule_is_known_to_programs_and_shown_to_people(
    error: type[FederationError],
) -> None:
    assert error("sum 3 came twice", rule="R5").rule == "R5"
    assert str(error("sum 3 came twice", rule="R5")) == "sum 3 came twice [R5]"
    assert (error("too late").rule, str(error("too late"))) == ("", "too late")


def test_every_kind_has_a_sentence_of_its_own() -> None:
    classes = [FederationError, *tree()]
    assert len({e.who_acts for e in classes}) == len({e.__doc__ for e in classes}) == len(classes)


def test_all_errors_are_found_in_one_module() -> None:
    assert {error.__module__ for error in tree()} == {errors.__name__}


@every_error
def test_the_command_line_prints_one_line_and_exits_with_the_code(
    error: type[FederationError],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def command() -> None:
        raise error("round 7 did not work")

    monkeypatch.setattr("sys.argv", ["fl-test"])
    with pytest.raises(SystemExit) as stopped:
        start(command)
    assert stopped.value.code == EXIT_CODES[error.__name__]
    assert capsys.readouterr() == ("", f"{error.__name__}: round 7 did not work\n")


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def command() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("sys.argv", ["fl-test"])
    with pytest.raises(ZeroDivisionError):
        start(command)
