"""Real clients that offer HTTP/2 on a plain connection are served over HTTP/1.1, with their bodies."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox.runtime.settings import ServiceSettings
from tests.support.api import Api, serve, user

SIGN_UPS = Path(__file__).parent.parent / "support" / "SignUps.java"


@pytest.fixture
def api(service_settings: ServiceSettings) -> Iterator[Api]:
    """A service with a database of its own."""
    with serve(service_settings) as served:
        yield served


def run(*command: str) -> list[str]:
    """Runs a program and returns the lines that it prints."""
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout.splitlines()


def test_javas_client_signs_up(api: Api) -> None:
    """It offers h2c with each request; every second body is chunked."""
    if not shutil.which("java") or not any("jdk.compiler" in line for line in run("java", "--list-modules")):
        pytest.skip("java is not installed, or lacks its compiler")
    quick = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
    printed = run("java", *quick, str(SIGN_UPS), f"http://127.0.0.1:{api.port}/v1/users", "6")
    assert printed == [f"201 java_{number}" for number in range(6)]


def test_curl_signs_up_with_http2(api: Api) -> None:
    """It offers h2c with each request of a persistent connection."""
    if not shutil.which("curl") or not any("HTTP2" in line for line in run("curl", "--version")):
        pytest.skip("curl is not installed, or lacks HTTP/2")
    requests: list[str] = []
    for number in range(3):
        requests += ["--next"] if requests else []
        requests += ["--silent", "--http2", "--header", "Content-Type: application/json"]
        requests += ["--data", json.dumps(user(f"curl_{number}")), "--output", "/dev/null"]
        requests += ["--write-out", "%{http_code} %{http_version} %{num_connects}\\n"]
        requests += [f"http://127.0.0.1:{api.port}/v1/users"]
    assert run("curl", *requests) == ["201 1.1 1", "201 1.1 0", "201 1.1 0"]
