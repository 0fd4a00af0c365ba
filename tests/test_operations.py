"""What operators get: systemd units, example files, containers, the demo."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
import tomllib
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import typer
import yaml
from deployment import BIN, Consortium, found, running
from typer.testing import CliRunner

import client.cli
import common.certs_cli
import server.cli
import server.report_cli
from client.config import SiteConfig
from common.config import load
from common.study import Study
from server.config import CoordinatorConfig

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
UNITS = ("consilium-site.service", "consilium-coordinator.service")
PHANTOMS = {
    "name": "phantoms",
    "format": "phantom",
    "num_patients": 24,
    "images_per_patient": 1,
    "declared_patients": 20,
}
HOSPITALS = ("st-olav", "lindenhof", "santa-maria", "riverside")


@pytest.fixture
def tiny_file(tmp_path: Path, tiny_study_table: Any) -> Path:
    """The tiny study without members: ``found`` fills them in."""
    table = tiny_study_table()
    del table["members"]
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(table))
    return path


def change(path: Path, **tables: Any) -> None:
    """Change top-level keys of a TOML file; a table's keys are added to it."""
    content = tomllib.loads(path.read_text())
    for key, value in tables.items():
        content[key] = {**content.get(key, {}), **value} if isinstance(value, dict) else value
    path.write_text(tomli_w.dumps(content))


def program(name: str) -> typer.Typer:
    """The command line behind an installed program, as its entry point starts it."""
    apps = {
        "fl-server": server.cli.app,
        "fl-certs": common.certs_cli.app,
        "fl-client": client.cli.app,
        "fl-report": server.report_cli.app,
    }
    return apps[name]


def accepts(command: list[str]) -> bool:
    """Whether a program of ours knows every word of a command line that is an option or command."""
    words = list(command[1:])
    if "--site-config" in words:  # read before a subcommand's help is shown
        words[words.index("--site-config") + 1] = str(DEPLOY / "site.toml")
    told = CliRunner().invoke(program(command[0]), [*words, "--help"])
    return told.exit_code == 0 and "Usage:" in told.output and (BIN / command[0]).exists()


# systemd


def unit(name: str) -> RawConfigParser:
    """A unit as its lines say; a key that is repeated keeps the last value."""
    parser = RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((DEPLOY / name).read_text())
    return parser


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_starts_a_program_with_options_that_it_has(name: str) -> None:
    command = shlex.split(unit(name)["Service"]["ExecStart"])
    if command[0] == "/bin/sh":
        command = shlex.split(command[2].split("exec ", 1)[1])
        assert command.pop() == "$$@"
        assert accepts(["fl-server", *command[1:], "--resume"])
    program = Path(command[0])
    assert program.parent == Path("/opt/consilium/.venv/bin")
    assert (BIN / program.name).exists()
    assert accepts([program.name, *command[1:]])


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_runs_as_its_own_user_and_may_write_its_state_alone(name: str) -> None:
    service = unit(name)["Service"]
    assert service["User"] == "consilium"
    assert service["NoNewPrivileges"] == "true"
    assert service["ProtectSystem"] == "strict"
    assert service["ProtectHome"] == "true"
    assert service["CapabilityBoundingSet"] == ""
    assert service["StateDirectory"] == "consilium"
    assert service["Restart"] == "always"
    assert "ReadWritePaths" not in service


@pytest.mark.parametrize("name", UNITS)
def test_systemd_finds_nothing_wrong_with_a_unit(name: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not on this machine")
    here = tmp_path / name
    here.write_text((DEPLOY / name).read_text().replace("/opt/consilium/.venv/bin", str(BIN)))
    told = subprocess.run(
        ["systemd-analyze", "verify", here],  # noqa: S607 - wherever it is
        capture_output=True,
        text=True,
        check=False,
    )
    assert (told.returncode, told.stderr) == (0, "")


def test_the_coordinators_unit_resumes_a_run_that_has_begun(tmp_path: Path) -> None:
    script = shlex.split(unit(UNITS[1])["Service"]["ExecStart"])[2].replace("$$", "$")
    told = tmp_path / "fl-server"
    told.write_text('#!/bin/sh\necho "$@"\n')
    told.chmod(0o755)
    script = script.replace("/opt/consilium/.venv/bin", str(tmp_path))

    def arguments() -> str:
        return subprocess.run(
            ["/bin/sh", "-c", script],
            env={"RUN_DIR": str(tmp_path / "run")},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    assert arguments().endswith(f"--run-dir {tmp_path}/run")
    (tmp_path / "run").mkdir()
    assert arguments().endswith(f"--run-dir {tmp_path}/run")
    (tmp_path / "run" / "epoch-2.json").touch()  # one member did not take part in the first
    assert arguments().endswith(f"--run-dir {tmp_path}/run --resume")


# Example files


def test_the_example_site_file_loads_and_shows_every_key_of_policy_and_certificates() -> None:
    site = load(DEPLOY / "site.toml", SiteConfig)
    table = tomllib.loads((DEPLOY / "site.toml").read_text())
    assert set(table) == set(SiteConfig.model_fields)
    text = (DEPLOY / "site.toml").read_text()
    for shown in (site.policy, site.certificates):  # what may be left out stands in a comment
        for key in type(shown).model_fields:
            assert re.search(rf"^(# )?{key} = ", text, re.MULTILINE), key


def test_the_example_site_file_permits_no_more_than_the_defaults_do() -> None:
    policy = load(DEPLOY / "site.toml", SiteConfig).policy
    assert policy.require_approval
    assert not policy.allow_no_privacy
    assert not policy.allow_seeded_randomness


def test_the_example_coordinator_file_loads_and_shows_every_key() -> None:
    own = load(DEPLOY / "coordinator.toml", CoordinatorConfig)
    table = tomllib.loads((DEPLOY / "coordinator.toml").read_text())
    assert set(table) == set(CoordinatorConfig.model_fields)
    assert set(table["certificates"]) == set(type(own.certificates).model_fields)


# Containers


COMPOSE = ROOT / "docker-compose.yml"
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
VARIABLES = {"CONSORTIUM", "CONSILIUM_UID", "CONSILIUM_GID"}


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return dict(content["services"])


def volumes(service: dict[str, Any], consortium: Path) -> dict[str, Path]:
    """Folders on this machine by the path in the container, longest path first."""
    found: dict[str, Path] = {}
    for volume in service["volumes"]:
        expanded = VARIABLE.sub(
            lambda match: str(consortium) if match[1] == "CONSORTIUM" else match[2], volume
        )
        here, there, *_ = expanded.split(":")
        found[there] = Path(here)
    return dict(sorted(found.items(), key=lambda each: -len(each[0])))


def outside(text: str, folders: dict[str, Path]) -> str:
    """The same text with the folders of this machine in the place of the container's."""
    for there, here in folders.items():
        text = text.replace(there, str(here))
    return text


def command_of(service: dict[str, Any], folders: dict[str, Path]) -> list[str]:
    """What a container runs, as it runs here."""
    return [outside(word, folders) for word in (*service["entrypoint"], *service["command"])]


def test_every_variable_of_docker_compose_has_a_default_and_is_explained() -> None:
    text = COMPOSE.read_text()
    head = text.split("\nx-program", 1)[0]
    assert {name for name, _ in VARIABLE.findall(text)} == VARIABLES
    assert all(default for _, default in VARIABLE.findall(text))
    assert all(name in head for name in VARIABLES)


def test_docker_compose_has_a_coordinator_and_four_hospitals(services: dict[str, Any]) -> None:
    assert set(services) == {"certs", "coordinator", *HOSPITALS}
    assert all(service["image"] == "consilium" for service in services.values())
    assert [name for name, service in services.items() if "build" in service] == ["certs"]
    assert "healthcheck" in services["coordinator"]


def test_a_hospitals_container_opens_no_port_and_has_no_rights(services: dict[str, Any]) -> None:
    for name in HOSPITALS:
        assert "ports" not in services[name]
        assert services[name]["read_only"]
        assert services[name]["cap_drop"] == ["ALL"]
        assert services[name]["security_opt"] == ["no-new-privileges:true"]


def test_no_two_containers_share_a_folder_and_keys_are_read_only(services: dict[str, Any]) -> None:
    mounted = [v for name, each in services.items() if name != "certs" for v in each["volumes"]]
    assert len({v.rsplit("}", 1)[1].split(":")[0] for v in mounted}) == len(mounted)
    assert all(v.endswith(":ro") for v in mounted if ":/etc/consilium" in v)


def test_every_command_of_docker_compose_is_one_of_ours(services: dict[str, Any]) -> None:
    for name in ("coordinator", *HOSPITALS):
        assert accepts(command_of(services[name], {}))
    assert accepts(services["certs"]["entrypoint"])


def test_the_port_of_docker_compose_is_the_one_that_its_coordinator_listens_on(
    services: dict[str, Any],
) -> None:
    port = load(DEPLOY / "coordinator.toml", CoordinatorConfig).port
    assert services["coordinator"]["ports"] == [f"{port}:{port}"]
    assert str(port) in services["coordinator"]["healthcheck"]["test"][-1]


def test_the_image_has_what_its_commands_need_and_no_root() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    kept = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    }
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)
    assert {"server", "client", "common", "pyproject.toml", "constraints.txt"} <= copied
    assert lines.index("USER consilium") > max(
        k for k, line in enumerate(lines) if line.startswith(("RUN", "COPY"))
    )


@pytest.mark.slow
def test_the_services_of_docker_compose_finish_a_run(
    services: dict[str, Any], tmp_path: Path, tiny_file: Path
) -> None:
    made = found(tmp_path / "made", tiny_file, HOSPITALS, data=PHANTOMS)
    here = tmp_path / "consortium"
    all_in_one = Consortium(here, HOSPITALS, made.study, made.port)
    for name in HOSPITALS:
        shutil.copytree(made.folder / "sites" / name, here / "sites" / name)
        shutil.move(here / "sites" / name / "state", here / "state" / name)
        (here / "images" / name).mkdir(parents=True)
        change(here / "sites" / name / "site.toml", state_dir="/var/lib/consilium")
    shutil.copytree(made.folder / "coordinator", here / "coordinator")
    shutil.copy(made.study, here / "coordinator" / "study.toml")
    own = here / "coordinator" / "coordinator.toml"
    shutil.copy(made.folder / "coordinator.toml", own)
    change(own, state_dir="/var/lib/consilium")
    (here / "state" / "coordinator").mkdir()
    with running(all_in_one):
        for name in (*HOSPITALS, "coordinator"):
            folders = volumes(services[name], here)
            assert all(folder.is_dir() for folder in folders.values())
            for file in folders["/etc/consilium"].glob("*.toml"):
                file.write_text(outside(file.read_text(), folders))
            all_in_one.start(name, *command_of(services[name], folders))
        all_in_one.wait_for("coordinator", "waiting for 4 sites")
        healthy = services["coordinator"]["healthcheck"]["test"][1:]
        healthy = [word.replace("9443", str(made.port)) for word in healthy]
        subprocess.run([BIN / healthy[0], *healthy[1:]], check=True)
        assert all_in_one.wait("coordinator") == 0, all_in_one.log("coordinator")
    run_dir = here / "state" / "coordinator" / "run"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["survivors"] == [sorted(HOSPITALS)] * 2


# What the documents tell people to type


DOCUMENTS = sorted((ROOT / "docs" / "operators").glob("*.md"))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TYPED = re.compile(r"(?:^|[ /;$(])(fl-(?:certs|client|report|server) [^;|&>)<\n]*)", re.MULTILINE)
CONTAINER = re.compile(
    r"^docker compose run(?: --rm| --service-ports)*(?: --entrypoint (\S+))? ([a-z]\S*) (.*)$",
    re.MULTILINE,
)


def typed_lines(document: Path) -> list[str]:
    """Every line of a document's blocks; one that goes on below is one line."""
    found = FENCED.findall(document.read_text())
    blocks = [block for language, block in found if language in ("", "sh")]
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_every_command_in_a_document_exists_with_its_options(document: Path) -> None:
    for line in typed_lines(document):
        for command in TYPED.findall(line):
            words = shlex.split(command.removesuffix(" goes on"))  # of a sentence
            assert accepts(words), command


def test_the_documents_do_have_commands() -> None:
    found = {
        path.stem: sum(len(TYPED.findall(each)) for each in typed_lines(path)) for path in DOCUMENTS
    }
    assert found["site"] > 3
    assert found["coordinator"] > 3
    assert found["two-machines"] > 10


def test_every_file_that_a_document_points_to_exists() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_certificates_of_docker_md_are_made_by_its_commands(
    services: dict[str, Any], tmp_path: Path
) -> None:
    folders = volumes(services["certs"], tmp_path)
    text = (ROOT / "docs" / "operators" / "docker.md").read_text()
    assert text.count("docker compose run") == len(CONTAINER.findall(text)) > len(HOSPITALS)
    for entrypoint, service, words in CONTAINER.findall(text):
        command = [entrypoint or services[service]["entrypoint"][0], *shlex.split(words)]
        if service != "certs":
            assert accepts(command)
            continue
        command = [outside(word, folders) for word in command]
        made = CliRunner().invoke(program(command[0]), command[1:])
        assert made.exit_code == 0, made.output
    for home in ("coordinator", *(f"sites/{name}" for name in HOSPITALS)):
        assert (tmp_path / home / "certificate.pem").exists()
        assert (tmp_path / home / "key.pem").stat().st_mode & 0o777 == 0o600


# How the programs behave


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> list[int]:
    """A process and everything that it started."""
    known = [pid]
    for parent in known:
        for task in Path("/proc").glob(f"{parent}/task/*"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                known += map(int, (task / "children").read_text().split())
    return known


def is_running(pid: int) -> bool:
    """Whether a process exists and is more than a name that waits to be read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second where it ends while it is read
        return False


def still_running(pids: list[int], patience_s: float = 10) -> list[int]:
    """Those that do not end soon: what a process leaves to its end outlives it by a moment."""
    end = time.monotonic() + patience_s
    while (found := [pid for pid in pids if is_running(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    return found


@pytest.mark.slow
def test_a_site_that_waits_for_others_uses_under_two_percent_of_a_core(
    tmp_path: Path, tiny_file: Path
) -> None:
    consortium = found(
        tmp_path / "c", tiny_file, ("st-olav", "lindenhof", "riverside"), data=PHANTOMS
    )
    with running(consortium):
        consortium.start_coordinator()
        site = consortium.start_site("st-olav")
        consortium.wait_for("coordinator", "st-olav: ready")
        time.sleep(5)
        before, began = cpu_seconds(site.pid), time.monotonic()
        time.sleep(10)
        share = (cpu_seconds(site.pid) - before) / (time.monotonic() - began)
        assert site.poll() is None
        print(f"an idle site: {100 * share:.2f} % of a core")  # noqa: T201 - shown on failure
        assert 0 < share < 0.02


@pytest.mark.slow
def test_ctrl_c_ends_the_coordinator_with_130_and_leaves_no_process(
    tmp_path: Path, tiny_file: Path
) -> None:
    consortium = found(
        tmp_path / "c", tiny_file, ("st-olav", "lindenhof", "riverside"), data=PHANTOMS
    )
    with running(consortium):
        coordinator = consortium.start_coordinator()
        consortium.wait_for("coordinator", "waiting for 3 sites")
        started = descendants(coordinator.pid)
        assert len(started) > 1  # Flower's SuperLink is one
        coordinator.send_signal(signal.SIGINT)
        assert consortium.wait("coordinator", 60) == 130
        assert not still_running(started)
    assert "--resume" in consortium.log("coordinator")


@pytest.mark.slow
def test_a_study_that_one_policy_refuses_goes_on_with_the_other_four(
    tmp_path: Path, tiny_file: Path
) -> None:
    names = (*HOSPITALS, "north-bay")
    consortium = found(
        tmp_path / "c", tiny_file, names, data=PHANTOMS, overrides={"cohort.min_sites": 4}
    )
    change(consortium.site("north-bay"), policy={"max_rounds": 1})
    change(consortium.folder / "coordinator.toml", wait_s=1.0)
    with running(consortium):
        for name in names:
            consortium.start_site(name)
        consortium.start_coordinator()
        assert consortium.wait("coordinator") == 0, consortium.log("coordinator")
    summary = json.loads((consortium.run_dir / "summary.json").read_text())
    assert summary["survivors"] == [sorted(HOSPITALS)] * 2
    told = consortium.log("coordinator")
    assert "north-bay: refused: policy" in told
    assert "max_rounds" not in told
    assert "max_rounds" not in (consortium.run_dir / "audit.jsonl").read_text()
    assert "2 rounds, max_rounds is 1" in consortium.log("north-bay")
    audit = (consortium.folder / "sites" / "north-bay" / "state" / "audit.jsonl").read_text()
    assert "2 rounds, max_rounds is 1" in audit


# The demo


@pytest.fixture(scope="module")
def demo_study() -> Study:
    return load(ROOT / "studies" / "demo.toml", Study)


def test_the_demos_study_is_private_with_randomness_nobody_can_repeat(demo_study: Study) -> None:
    from common.plan import plan_privacy

    plan = plan_privacy(demo_study, 320)
    assert plan is not None
    assert (plan.terms.unit, plan.terms.randomness) == ("patient", "os")
    assert plan.epsilon_after(demo_study.num_rounds) <= 8


@pytest.mark.slow
def test_the_demo_learns_and_leaves_a_report_that_verifies(tmp_path: Path) -> None:
    run_dir = tmp_path / "demo"
    told = subprocess.run(
        [ROOT / "scripts" / "demo", "--run-dir", run_dir],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert told.returncode == 0, told.stdout[-3000:] + told.stderr
    assert "4 of 4" in told.stdout
    assert (run_dir / "report.html").stat().st_size > 10_000
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["metrics"]["final"]["auroc"] > 0.7
    assert all(1 < site["epsilon"] <= 8 for site in summary["privacy"].values())
    verified = subprocess.run([BIN / "fl-report", "verify", run_dir], check=False)
    assert verified.returncode == 0
    for name in HOSPITALS:
        key = run_dir / "sites" / name / "key.pem"
        assert key.stat().st_mode & 0o777 == 0o600
        assert (run_dir / "sites" / name / "state" / "audit.jsonl").exists()


@pytest.mark.slow
def test_ctrl_c_ends_the_demo_and_all_of_its_processes(tmp_path: Path) -> None:
    demo = subprocess.Popen(
        [ROOT / "scripts" / "demo", "--run-dir", tmp_path / "demo"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert demo.stdout is not None
    try:
        for line in demo.stdout:
            if line.startswith("$ fl-server"):
                break
        time.sleep(1)
        started = descendants(demo.pid)
        assert len(started) >= 6  # itself, four hospitals, the coordinator
        os.killpg(demo.pid, signal.SIGINT)  # as a terminal does
        assert demo.wait(60) == 130
        assert not still_running(started)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(demo.pid, signal.SIGKILL)
        demo.wait()
        demo.stdout.close()


def test_the_demo_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    told = subprocess.run(
        [ROOT / "scripts" / "demo", "--run-dir", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 2
    assert "is not empty" in told.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
