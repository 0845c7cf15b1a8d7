"""Names, versions, holders and limits of adapters, whichever runner applies them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ayllu.engine.adapter_set import LoadedAdapters
from ayllu.engine.adapters import AdapterSet
from ayllu.engine.native_adapters import NativeAdapters
from ayllu.errors import NoSpaceError, UnknownModelError, UsageError
from ayllu.model.config import ModelConfig
from ayllu.model.decoder import random_decoder
from ayllu.weights.adapter import Adapter, read_adapter
from tests.engine.native_models import native_model
from tests.engine.small_adapters import write_adapter
from tests.model.tiny import tiny_llama, tiny_llama4
from tests.weights.small_checkpoints import random_checkpoint

Make = Callable[..., LoadedAdapters[Any]]


@pytest.fixture(params=["torch", "native"])
def make(request: pytest.FixtureRequest) -> Make:
    """Makes an empty set beside a random decoder, with the limits given."""

    def torch_set(config: ModelConfig | None = None, **limits: int) -> LoadedAdapters[Any]:
        return AdapterSet(random_decoder(config or tiny_llama(), 1), **limits)

    def native_set(config: ModelConfig | None = None, **limits: int) -> LoadedAdapters[Any]:
        model = native_model(random_checkpoint(config or tiny_llama()))
        return NativeAdapters(model.runner.decoder, model.config, **limits)

    return torch_set if request.param == "torch" else native_set


def read_random(tmp_path: Path, config: ModelConfig, seed: int, **options: Any) -> Adapter:
    return read_adapter(write_adapter(tmp_path / f"{seed}", config, seed, **options), config)


def size_of(make: Make, adapter: Adapter) -> int:
    adapters = make()
    adapters.load("it", adapter)
    return adapters.nbytes


def test_equal_content_under_two_names_is_held_once(make: Make, tmp_path: Path) -> None:
    adapters = make()
    adapter = read_random(tmp_path, tiny_llama(), 1)
    again = read_adapter(tmp_path / "1", tiny_llama())
    assert adapters.load("one", adapter) == adapters.load("two", again)
    assert adapters.nbytes == size_of(make, adapter) and adapters.names == ("one", "two")
    adapters.unload("one")
    assert adapters.identity("two") == adapter.digest and adapters.nbytes == size_of(make, adapter)


def test_a_version_stays_until_its_last_holder_lets_go(make: Make, tmp_path: Path) -> None:
    adapters = make()
    adapters.load("tuned", read_random(tmp_path, tiny_llama(), 1))
    held = [adapters.acquire("tuned") for _ in range(2)]
    adapters.load("tuned", read_random(tmp_path, tiny_llama(), 2))
    adapters.unload("tuned")
    assert adapters.names == () and adapters.nbytes > 0
    with pytest.raises(UnknownModelError):
        adapters.acquire("tuned")
    for identity in held:
        assert adapters.placed(identity) is not None
        adapters.release(identity)
    assert adapters.nbytes == 0
    with pytest.raises(AssertionError, match="released too often"):
        adapters.release(held[0])
    with pytest.raises(AssertionError, match="no adapter has the identity"):
        adapters.placed(held[0])


def test_count_and_bytes_are_limited_and_a_refused_load_changes_nothing(make: Make, tmp_path: Path) -> None:
    small, other, large = (read_random(tmp_path, tiny_llama(), rank, rank=rank) for rank in (2, 4, 40))
    adapters = make(max_adapters=2, max_bytes=size_of(make, small) + size_of(make, other))
    adapters.load("small", small)
    for name in ("large", "small"):
        with pytest.raises(NoSpaceError):
            adapters.load(name, large)
    assert adapters.identity("small") == small.digest and adapters.nbytes == size_of(make, small)
    held = adapters.acquire("small")
    adapters.load("other", other)
    with pytest.raises(NoSpaceError, match="room for 2"):
        adapters.load("again", small)
    # A version that lost its name takes its place until its last request has ended.
    adapters.unload("small")
    with pytest.raises(NoSpaceError, match="room for 2"):
        adapters.load("small", read_random(tmp_path, tiny_llama(), 1, rank=1))
    adapters.release(held)
    adapters.load("small", small)
    assert adapters.names == ("other", "small")


def test_a_replaced_version_makes_room_for_its_successor(make: Make, tmp_path: Path) -> None:
    one, two = (read_random(tmp_path, tiny_llama(), seed) for seed in (1, 2))
    adapters = make(max_adapters=1, max_bytes=size_of(make, one))
    adapters.load("tuned", one)
    adapters.load("tuned", two)
    assert adapters.nbytes == size_of(make, two)
    adapters.acquire("tuned")
    with pytest.raises(NoSpaceError):
        adapters.load("tuned", one)
    assert adapters.identity("tuned") == two.digest


def test_wrong_names_and_unknown_ones_are_errors_that_say_so(make: Make, tmp_path: Path) -> None:
    adapters = make()
    adapter = read_random(tmp_path, tiny_llama(), 1)
    for name in ("", " ", "a b", "../x", "é", "a\n", "-x", "x" * 201):
        with pytest.raises(UsageError, match="cannot be the name"):
            adapters.load(name, adapter)
    adapters.load("legal/tuned:v1", adapter)
    for action in (adapters.unload, adapters.acquire, adapters.identity):
        with pytest.raises(UnknownModelError, match="Did you mean legal/tuned:v1"):
            action("legal/tuned:v2")


def test_an_adapter_for_another_model_is_refused(make: Make, tmp_path: Path) -> None:
    narrow = replace(tiny_llama(), hidden_size=32)
    turned = replace(tiny_llama(), rope=replace(tiny_llama().rope, layout="interleaved"))
    for seed, config in enumerate((tiny_llama4(expert_step=2), narrow, turned)):
        adapter = read_random(tmp_path, config, seed)
        with pytest.raises(UsageError, match="does not fit this model"):
            make().load("tuned", adapter)
    for path in ("lm_head", "layers.0.feed_forward.router", "layers.9.attention.q_proj"):
        change = next(iter(read_random(tmp_path, tiny_llama(), 9).modules.values()))
        with pytest.raises(UsageError, match="does not fit this model"):
            make().load("tuned", Adapter({path: change}, "half"))


def test_experts_are_not_changed_but_the_shared_one_is(make: Make, tmp_path: Path) -> None:
    config = tiny_llama4(layers=2)
    adapter = read_random(tmp_path, config, 1)
    assert any("shared_expert" in path for path in adapter.modules)
    adapters = make(config)
    adapters.load("tuned", adapter)
    routed = {"layers.0.feed_forward.experts.gate_proj": next(iter(adapter.modules.values()))}
    with pytest.raises(UsageError, match="does not fit this model"):
        adapters.load("routed", Adapter(routed, "interleaved"))
