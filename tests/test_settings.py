"""Settings: the order of origins, and mistakes named with their origin."""

from __future__ import annotations

from pathlib import Path

import pytest

from ayllu import settings as settings_module
from ayllu.engine import options as options_module
from ayllu.errors import UsageError
from ayllu.settings import Settings, load_settings


def _file(folder: Path, text: str) -> dict[str, str]:
    file = folder / "ayllu.toml"
    file.write_text(text, encoding="utf-8")
    return {"AYLLU_CONFIG": str(file)}


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    environment = _file(tmp_path, 'device = "cpu"\ndtype = "float16"\ntimeout_s = 5\n')
    environment |= {"AYLLU_DEVICE": "cuda", "AYLLU_DTYPE": "bfloat16"}
    settings = load_settings({"device": "mps", "dtype": None}, environment)
    assert (settings.device, settings.origin("device")) == ("mps", "flag")
    assert (settings.dtype, settings.origin("dtype")) == ("bfloat16", "AYLLU_DTYPE")
    assert settings.timeout_s == 5
    assert settings.origin("timeout_s").endswith("ayllu.toml")
    assert (settings.default_model, settings.origin("default_model")) == (Settings().default_model, "default")


def test_two_settings_objects_do_not_share_origins(tmp_path: Path) -> None:
    load_settings({"device": "cpu"}, _file(tmp_path, ""))
    assert load_settings({}, _file(tmp_path, "")).origin("device") == "default"


def test_an_empty_variable_is_no_value(tmp_path: Path) -> None:
    # An empty AYLLU_STORE once made the current folder the store, and `remove` would have deleted from it.
    environment = _file(tmp_path, "") | {"AYLLU_STORE": ""}
    assert load_settings({}, environment).store == Settings().store


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("device = ", "not valid TOML"),
        ("devise = 'cpu'", "Did you mean device"),
        ("timeout_s = -1", "timeout_s = -1"),
        ("timeout_s = 'x'", "ayllu.toml"),
        ("runner = 'gpu'", "it should be auto, native or torch"),
        ("threads = 0", "it should be a whole number from 1 to 1024"),
        ("threads = true", "threads = True"),
    ],
)
def test_a_wrong_file_is_named(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        load_settings({}, _file(tmp_path, text))


def test_a_named_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.toml"):
        with pytest.raises(UsageError, match="cannot be read"):
            load_settings({}, {"AYLLU_CONFIG": str(path)})


def test_what_an_engine_may_be_told_is_the_same_here_and_there() -> None:
    for name in ("RunnerName", "CacheType", "GpuWeights", "ExpertPlace", "Speculate"):
        assert getattr(settings_module, name) == getattr(options_module, name), name


def test_threads_come_as_a_number_from_anywhere(tmp_path: Path) -> None:
    assert load_settings({}, _file(tmp_path, "threads = 3")).threads == 3
    assert load_settings({}, _file(tmp_path, "") | {"AYLLU_THREADS": "4"}).threads == 4
    with pytest.raises(UsageError, match="AYLLU_THREADS"):
        load_settings({}, _file(tmp_path, "") | {"AYLLU_THREADS": "many"})
