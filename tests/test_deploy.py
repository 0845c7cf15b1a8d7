"""What containers and services are made from, checked where no container engine runs."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"


def _instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, continued lines joined."""
    lines = [
        line
        for line in (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    ]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined) if word]


def _values(instruction: str) -> list[str]:
    return [rest for word, rest in _instructions() if word == instruction]


def _runtime() -> list[tuple[str, str]]:
    found = _instructions()
    return found[max(place for place, (word, _) in enumerate(found) if word == "FROM") :]


def _ignored(path: str) -> bool:
    """Whether .dockerignore keeps `path` out: the last rule that fits decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        rule = line.strip()
        if not rule or rule.startswith("#"):
            continue
        pattern = rule.removeprefix("!").removeprefix("**/")
        anywhere = Path(path).parts if "**/" in rule else ()
        names = [path, *map(str, Path(path).parents), *anywhere]
        if any(fnmatch(name, pattern) for name in names if name != "."):
            out = not rule.startswith("!")
    return out


def test_the_linter_is_content_with_the_dockerfile() -> None:
    beside = Path(sys.executable).with_name("hadolint")
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed")
    command = [program, "--config", str(DEPLOY / "hadolint.yaml"), str(DEPLOY / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_all_that_is_copied_exists_and_reaches_the_build() -> None:
    sources = [
        source for rest in _values("COPY") if "--from" not in rest for source in shlex.split(rest)[:-1]
    ]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not _ignored(source), source


def test_all_that_the_installation_reads_is_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    copied = " ".join(_values("COPY")).split()
    for name in (
        "pyproject.toml",
        "hatch_build.py",
        "constraints.txt",
        project["readme"],
        *project["license-files"],
    ):
        assert name in copied
    extras = next(rest for rest in _values("ARG") if rest.startswith("EXTRAS="))
    assert set(extras.removeprefix("EXTRAS=").split(",")) <= set(project["optional-dependencies"]) - {"torch"}


@pytest.mark.parametrize(
    "path", [".git/config", ".venv/bin/python", "deploy/secrets/ayllu.toml", ".env", "tests/conftest.py"]
)
def test_nothing_else_reaches_the_build(path: str) -> None:
    assert _ignored(path)


def test_a_library_compiled_elsewhere_does_not_reach_the_build() -> None:
    # It would be newer than its sources, taken for current, and be for another machine.
    assert _ignored("src/ayllu/kernels/native/libayllu_native.so")
    assert not _ignored("src/ayllu/kernels/native/kernels.cpp")


def test_the_image_runs_as_nobody_in_particular_and_without_a_compiler() -> None:
    runtime = _runtime()
    assert [rest for word, rest in runtime if word == "USER"] == ["10001:10001"]
    assert not any("apt-get" in rest for _, rest in runtime)
    places = [word for word, _ in runtime]
    assert places.index("USER") > max(place for place, word in enumerate(places) if word in ("RUN", "COPY"))
    assert ("STOPSIGNAL", "SIGTERM") in runtime
    assert ("VOLUME", "/data") in runtime
    assert {rest for word, rest in _instructions() if word == "FROM"} == {
        "${PYTHON_IMAGE} AS builder",
        "${PYTHON_IMAGE} AS runtime",
    }


def test_all_that_is_written_goes_to_the_volume() -> None:
    (environment,) = (dict(pair.split("=", 1) for pair in shlex.split(rest)) for rest in _values("ENV"))
    for name in ("HOME", "HF_HOME", "AYLLU_STORE", "AYLLU_DATA"):
        assert environment[name].startswith("/data")
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"


def test_no_secret_is_in_the_recipe() -> None:
    for word, rest in _instructions():
        if word in ("ENV", "ARG"):
            assert not re.search("password|secret|token|_key", rest, re.IGNORECASE)


def test_the_images_settings_are_settings() -> None:
    from ayllu.settings import load_settings

    (environment,) = (dict(pair.split("=", 1) for pair in shlex.split(rest)) for rest in _values("ENV"))
    settings = load_settings({}, {**environment, "AYLLU_CONFIG": ""})
    assert (settings.host, settings.port, str(settings.data)) == ("0.0.0.0", 8420, "/data/server")


def test_the_health_check_tells_a_healthy_server_from_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import json
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" and healthy[0] else 503)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *more: object) -> None:
            pass

    healthy = [True]
    (check,) = _values("HEALTHCHECK")
    command = [sys.executable, *json.loads(check[check.index("[") :])[1:]]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("AYLLU_PORT", str(server.server_address[1]))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    try:
        assert subprocess.run(command, check=False, capture_output=True).returncode == 0
        healthy[0] = False
        assert subprocess.run(command, check=False, capture_output=True).returncode != 0
    finally:
        server.shutdown()
        server.server_close()
    assert subprocess.run(command, check=False, capture_output=True).returncode != 0


def _compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", ["ayllu", "postgres"])
def test_a_service_has_no_more_rights_than_it_needs(name: str) -> None:
    service = _compose()["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"mem_limit", "cpus", "pids_limit", "tmpfs", "stop_grace_period"} <= service.keys()
    assert all(":size=" in mount and "/" in mount for mount in service["tmpfs"])
    forbidden = {"privileged", "cap_add", "devices", "network_mode", "pid", "ipc", "userns_mode", "env_file"}
    assert not forbidden & service.keys()
    assert not any("docker.sock" in volume or volume.startswith((".", "/")) for volume in service["volumes"])


def test_only_this_machine_reaches_the_port_and_nobody_the_database() -> None:
    compose = _compose()
    assert compose["services"]["ayllu"]["ports"] == ["127.0.0.1:8420:8420"]
    assert "ports" not in compose["services"]["postgres"]
    assert compose["services"]["postgres"]["networks"] == ["database"]
    assert compose["networks"]["database"]["internal"] is True
    # On internal networks alone, no port would be published.
    assert "front" in compose["services"]["ayllu"]["networks"]


def test_passwords_are_in_files_that_the_repository_does_not_take() -> None:
    compose = _compose()
    for service in compose["services"].values():
        for name in service["environment"]:
            assert name.endswith("_FILE") or "PASSWORD" not in name
        assert set(service["secrets"]) <= compose["secrets"].keys()
    for secret in compose["secrets"].values():
        assert secret["file"].startswith("./secrets/")
    assert (DEPLOY / "secrets" / ".gitignore").read_text(encoding="utf-8").split("\n")[1] == "*"


def test_the_server_waits_for_a_healthy_database_and_gets_time_to_stop() -> None:
    from ayllu.settings import Settings

    services = _compose()["services"]
    assert services["ayllu"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert "healthcheck" in services["postgres"]
    assert int(services["ayllu"]["stop_grace_period"].removesuffix("s")) > Settings().stop_timeout_s + 5


def test_the_servers_address_is_one_that_it_agrees_to_listen_on() -> None:
    from ayllu.server.serve import require_safe_address
    from ayllu.settings import load_settings

    (environment,) = (dict(pair.split("=", 1) for pair in shlex.split(rest)) for rest in _values("ENV"))
    given = {**environment, **_compose()["services"]["ayllu"]["environment"], "AYLLU_CONFIG": ""}
    require_safe_address(load_settings({}, given))


def test_the_unit_is_hardened_and_stops_as_the_server_does() -> None:
    lines = (DEPLOY / "ayllu.service").read_text(encoding="utf-8").splitlines()
    for line in (
        "DynamicUser=yes",
        "NoNewPrivileges=yes",
        "CapabilityBoundingSet=",
        "ProtectSystem=strict",
        "ProtectHome=yes",
        "RestrictNamespaces=yes",
        "SystemCallFilter=@system-service",
        "LoadCredential=ayllu.toml:/etc/ayllu/ayllu.toml",
        "KillSignal=SIGTERM",
    ):
        assert line in lines


def test_the_page_says_what_the_files_say() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    for name in ("deploy/secrets/ayllu.toml", "deploy/secrets/postgres_password", "deploy/compose.yaml"):
        assert name in page
    settings = re.findall(r"\bAYLLU_([A-Z_]+)\b", page)
    from ayllu.settings import Settings

    known = {*Settings.__dataclass_fields__, "config"}
    assert {name.lower() for name in settings} <= known
