"""Paths as people type them: used, or refused as a mistake of theirs, never a crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from ayllu.errors import UsageError
from ayllu.paths import expanded


def test_the_home_folder_is_put_in_and_nothing_need_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/models/x") == tmp_path / "models" / "x"
    assert expanded("no/such/file") == Path("no/such/file")


@pytest.mark.parametrize("text", ["~nosuchuser/m", "x" * 300, "a\0b", "/" + "x/" * 3000])
def test_what_is_no_path_is_a_usage_error_in_one_line(text: str) -> None:
    with pytest.raises(UsageError, match="not a usable path") as caught:
        expanded(text)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 250
