"""An endpoint checks itself before anything is sent anywhere."""

from __future__ import annotations

from typing import Any

import pytest

from ayllu.engine.remote.endpoint import RemoteEndpoint
from ayllu.errors import UsageError


@pytest.mark.parametrize(
    "settings",
    [
        {"base_url": "host:8000"},
        {"base_url": "ftp://host"},
        {"base_url": "http://[broken"},
        {"base_url": "https://host:99999"},
        {"base_url": "https://user:password@host"},
        {"base_url": "https://host/?key=password"},
        {"base_url": "https://host/a b"},
        {"base_url": "http://example.org"},
        {"base_url": "http://127.0.0.1.example.org"},
        {"model": ""},
        {"dialect": "vlm"},
        {"dialect": "azure"},
        {"api_version": "2024-10-21"},
        {"api_key": ""},
        {"api_key": "two words"},
        {"api_key": "line\nbreak"},
        {"headers": {"Authorization": "x"}},
        {"headers": {"X": "line\r\nbreak"}},
        {"headers": {"bad name": "x"}},
        {"retries": -1},
        {"read_timeout_s": 0.0},
        {"max_open": 0},
    ],
)
def test_an_endpoint_that_cannot_be_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as raised:
        RemoteEndpoint(**{"base_url": "https://host", "model": "m", **settings})
    assert "password" not in str(raised.value).replace("user name or password", "")
    assert raised.value.fix


@pytest.mark.parametrize(
    "base_url", ["http://localhost:8000", "http://127.0.0.1", "http://[::1]:8000/v1", "https://example.org"]
)
def test_plain_http_is_for_this_machine(base_url: str) -> None:
    RemoteEndpoint(base_url=base_url, model="m")


def test_plain_http_elsewhere_can_be_allowed() -> None:
    RemoteEndpoint(base_url="http://gpu-cluster:8000", model="m", allow_plain_http=True)
