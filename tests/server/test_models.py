"""The pool of models: who is loaded, who gives way, who waits, and what a failing load does to the others."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ayllu.engine.native import NativeEngine
from ayllu.engine.options import EngineOptions
from ayllu.errors import (
    AylluError,
    ConflictError,
    EngineUnavailableError,
    ModelFileError,
    NoSpaceError,
    OverloadedError,
    UnknownModelError,
    UsageError,
)
from ayllu.server import model_slot
from ayllu.server.model_memory import MemoryEstimate, Needs
from ayllu.server.model_slot import Failures
from ayllu.server.models import ModelPool, ModelStatus
from ayllu.weights.installed import MANIFEST, Manifest, StoredFile
from ayllu.weights.store import Store
from tests.engine.scripted_engine import ScriptedEngine
from tests.engine.toy_engine import running


class PoolEngine(ScriptedEngine):
    """An engine whose state a test sets, and which tells how much memory it takes."""

    def __init__(self, model: str, total_bytes: int | None) -> None:
        super().__init__(slots=0, model=model)
        self.status = "ready"
        self.adapter_loads: list[tuple[str, Path]] = []
        if total_bytes is not None:
            self.info = replace(self.info, facts={"total_bytes": total_bytes})

    def load_adapter(self, name: str, path: Path) -> None:
        self.adapter_loads.append((name, path))
        time.sleep(0.01)
        super().load_adapter(name, path)


class Machine:
    """Opens scripted engines of stated sizes. A model whose gate is closed goes on loading."""

    def __init__(self, **sizes: int) -> None:
        self.sizes = sizes
        self.actual: dict[str, int] = {}
        self.opened: Counter[str] = Counter()
        self.engines: dict[str, PoolEngine] = {}
        self.failing: dict[str, Exception] = {}
        self.gates: dict[str, threading.Event] = {}
        self.aborted: list[str] = []
        self.options: dict[str, EngineOptions] = {}

    def open(self, path: Path, options: EngineOptions, /, *, progress: Any, model_name: str) -> PoolEngine:
        self.opened[model_name] += 1
        self.options[model_name] = options
        gate = self.gates.get(model_name)
        try:
            with progress.task("load", 2) as task:
                task.advance(1)
                while gate is not None and not gate.wait(0.005):
                    task.advance(0)
        except BaseException:
            self.aborted.append(model_name)
            raise
        if model_name in self.failing:
            raise self.failing[model_name]
        self.engines[model_name] = PoolEngine(model_name, self.actual.get(model_name))
        return self.engines[model_name]

    def estimate(self, path: Path, options: EngineOptions, *, available_bytes: int, model_name: str) -> Needs:
        return Needs(self.sizes[model_name], options)

    def pool(self, budget: int, keep_alive_s: float = 1000.0, **more: Any) -> ModelPool:
        pool = ModelPool(
            more.pop("store", Store(Path("/nonexistent"))),
            options=more.pop("options", lambda name: EngineOptions()),
            budget_bytes=budget,
            keep_alive_s=keep_alive_s,
            pinned=[(name, Path("models") / name) for name in self.sizes],
            opener=self.open,
            estimate=more.pop("estimate", self.estimate),
            **more,
        )
        pool._room.wait_s = 0.05
        return pool

    def closed_gate(self, name: str) -> threading.Event:
        self.gates[name] = threading.Event()
        return self.gates[name]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


async def until(condition: Callable[[], bool]) -> None:
    """For what must come, however slow the machine is."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not come"
        await asyncio.sleep(0.005)


async def use(pool: ModelPool, name: str) -> None:
    async with pool.lease(name):
        pass


def status_of(pool: ModelPool, name: str) -> ModelStatus:
    return next(one for one in pool.listed() if one.name == name)


def loaded(pool: ModelPool) -> list[str]:
    return sorted(pool.engines())


def test_requests_that_come_together_share_one_load() -> None:
    async def work() -> None:
        machine = Machine(a=1)
        pool = machine.pool(1)
        await asyncio.gather(*(use(pool, "a") for _ in range(20)))
        assert machine.opened["a"] == 1
        await pool.close()

    run(work())


def test_a_request_that_leaves_while_the_model_loads_takes_nothing_from_the_others() -> None:
    async def work() -> None:
        machine = Machine(a=1)
        gate = machine.closed_gate("a")
        pool = machine.pool(1)
        first, second = (asyncio.create_task(use(pool, "a")) for _ in range(2))
        await until(lambda: machine.opened["a"] == 1)
        first.cancel()
        await asyncio.sleep(0)
        assert status_of(pool, "a").status == "loading"
        gate.set()
        await second
        assert first.cancelled() and machine.opened["a"] == 1 and loaded(pool) == ["a"]
        assert status_of(pool, "a").open_requests == 0
        await pool.close()

    run(work())


def test_a_load_that_nobody_waits_for_any_more_ends_in_an_idle_model() -> None:
    async def work() -> None:
        machine = Machine(a=1)
        gate = machine.closed_gate("a")
        pool = machine.pool(1)
        only = asyncio.create_task(use(pool, "a"))
        await until(lambda: machine.opened["a"] == 1)
        only.cancel()
        gate.set()
        await until(lambda: loaded(pool) == ["a"] and status_of(pool, "a").status == "loaded")
        await pool.close()
        assert machine.engines["a"].closed

    run(work())


def test_room_is_made_by_those_that_were_unused_for_longest() -> None:
    async def work() -> None:
        machine = Machine(a=1, b=1, c=1, d=2)
        pool = machine.pool(3)
        for name in ("a", "b", "c", "a"):
            await use(pool, name)
        await use(pool, "d")
        assert loaded(pool) == ["a", "d"] and pool.reserved_bytes == 3
        assert machine.engines["b"].closed and machine.engines["c"].closed
        await pool.close()

    run(work())


def test_what_is_in_use_never_gives_way_and_the_refusal_says_who_has_the_memory() -> None:
    async def work() -> None:
        machine = Machine(a=2, b=2)
        pool = machine.pool(3)
        async with pool.lease("a"):
            with pytest.raises(OverloadedError) as refusal:
                await use(pool, "b")
            assert loaded(pool) == ["a"] and machine.opened["b"] == 0
        assert "in use by a" in refusal.value.problem and refusal.value.retry_after_s > 0
        await use(pool, "b")
        assert loaded(pool) == ["b"]
        await pool.close()

    run(work())


def test_of_an_older_model_in_use_and_a_newer_idle_one_the_idle_one_gives_way() -> None:
    async def work() -> None:
        machine = Machine(a=1, b=1, c=1)
        pool = machine.pool(2)
        async with pool.lease("a"):
            await use(pool, "b")
            await use(pool, "c")
            assert loaded(pool) == ["a", "c"] and not machine.engines["a"].closed
        await pool.close()

    run(work())


def test_a_load_waits_for_a_lease_to_end() -> None:
    async def work() -> None:
        machine = Machine(a=2, b=2)
        pool = machine.pool(3)
        pool._room.wait_s = 60
        async with pool.lease("a"):
            waiting = asyncio.create_task(use(pool, "b"))
            await asyncio.sleep(0.05)
            assert not waiting.done() and machine.opened["b"] == 0
        await waiting
        assert loaded(pool) == ["b"]
        await pool.close()

    run(work())


def test_what_can_never_fit_is_refused_without_loading_and_without_unloading_others() -> None:
    async def work() -> None:
        machine = Machine(a=2, huge=4)
        pool = machine.pool(3)
        await use(pool, "a")
        with pytest.raises(NoSpaceError, match=r"huge needs 4 bytes .* 3 bytes"):
            await use(pool, "huge")
        assert machine.opened["huge"] == 0 and loaded(pool) == ["a"]
        await pool.close()

    run(work())


def test_beside_models_in_use_a_model_is_given_fewer_slots_but_no_shorter_context() -> None:
    async def work() -> None:
        machine = Machine(a=6, b=0)

        def estimate(path: Path, options: EngineOptions, *, available_bytes: int, model_name: str) -> Needs:
            if model_name == "a":
                return Needs(6, options, 100)
            slots = min(8, available_bytes)
            return Needs(slots, replace(options, slots=slots), 100)

        pool = machine.pool(10, estimate=estimate)
        async with pool.lease("a"):
            await use(pool, "b")
        assert machine.options["b"].slots == 4 and pool.reserved_bytes == 10
        await pool.close()

    run(work())


def test_the_engine_has_the_last_word_on_what_it_takes() -> None:
    async def work() -> None:
        machine = Machine(a=2, b=2, c=2)
        machine.actual = {"a": 1, "b": 1, "c": 3}
        pool = machine.pool(4)
        await use(pool, "a")
        await use(pool, "b")
        assert pool.reserved_bytes == 2
        await use(pool, "c")
        assert loaded(pool) == ["b", "c"] and pool.reserved_bytes == 4
        assert status_of(pool, "c").needs_bytes == status_of(pool, "c").memory_bytes == 3
        await pool.close()

    run(work())


def test_an_engine_that_takes_more_than_there_is_is_closed_again() -> None:
    async def work() -> None:
        machine = Machine(a=2)
        machine.actual = {"a": 5}
        pool = machine.pool(4)
        with pytest.raises(NoSpaceError):
            await use(pool, "a")
        await until(lambda: machine.engines["a"].closed and pool.reserved_bytes == 0)
        assert status_of(pool, "a").status == "failed"
        await pool.close()

    run(work())


def test_an_unused_model_is_unloaded_after_its_time_and_a_used_one_is_not() -> None:
    async def work() -> None:
        machine = Machine(a=1, b=1)
        pool = machine.pool(2)
        await use(pool, "a")
        async with pool.lease("b"):
            pool.keep_alive_s = 0.01
            await until(lambda: loaded(pool) == ["b"])
            await asyncio.sleep(0.3)
            assert loaded(pool) == ["b"]
        await until(lambda: not loaded(pool) and pool.reserved_bytes == 0)
        await pool.close()

    run(work())


def test_a_keep_alive_of_nothing_unloads_at_once() -> None:
    async def work() -> None:
        machine = Machine(a=1)
        pool = machine.pool(1, keep_alive_s=0)
        async with pool.lease("a"):
            assert loaded(pool) == ["a"]
        assert loaded(pool) == []
        await until(lambda: pool.reserved_bytes == 0)
        await pool.close()

    run(work())


def test_a_load_that_fails_is_not_tried_again_at_every_request() -> None:
    async def work() -> None:
        machine = Machine(a=1)
        machine.failing["a"] = ModelFileError("a.gguf", "cut short")
        pool = machine.pool(1)
        for _ in range(5):
            with pytest.raises(ModelFileError, match="cut short") as refusal:
                await use(pool, "a")
            assert 0 < refusal.value.retry_after_s <= 5  # type: ignore[attr-defined]
        assert machine.opened["a"] == 1 and pool.reserved_bytes == 0
        status = status_of(pool, "a")
        assert status.status == "failed" and "cut short" in (status.error or "")
        del machine.failing["a"]
        await pool.unload("a")
        await use(pool, "a")
        assert status_of(pool, "a").status == "loaded" and status_of(pool, "a").error is None
        await pool.close()

    run(work())


def test_the_time_between_tries_doubles_to_five_minutes_and_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr(model_slot.time, "monotonic", lambda: now[0])
    failures, waits = Failures(), []

    def wait() -> float:
        with pytest.raises(EngineUnavailableError) as refusal:
            failures.require_none()
        return float(refusal.value.retry_after_s)  # type: ignore[attr-defined]

    for _ in range(8):
        failures.note(EngineUnavailableError("no"))
        waits.append(wait())
        now[0] += waits[-1]
        failures.require_none()
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300]
    now[0] += 1000
    failures.note(EngineUnavailableError("no"))
    assert wait() == 5


def test_an_unexpected_failure_is_told_by_its_kind_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        machine = Machine(a=1)
        machine.failing["a"] = ValueError("secret text")
        pool = machine.pool(1)
        with pytest.raises(EngineUnavailableError, match="ValueError") as refusal:
            await use(pool, "a")
        assert "secret" not in str(refusal.value)
        await pool.close()

    run(work())
    assert "secret text" in caplog.text


def test_an_engine_that_stays_down_is_closed_and_may_be_loaded_anew_later() -> None:
    async def work() -> None:
        machine = Machine(a=1)
        pool = machine.pool(1)
        async with pool.lease("a"):
            machine.engines["a"].status = "restarting"
            assert status_of(pool, "a").status == "restarting"
            machine.engines["a"].status = "stopped"
            assert status_of(pool, "a").status == "failed"
            dead = machine.engines["a"]
            with pytest.raises(EngineUnavailableError, match="stays down") as refusal:
                await use(pool, "a")
            assert refusal.value.retry_after_s > 0  # type: ignore[attr-defined]
            await until(lambda: dead.closed and pool.reserved_bytes == 0)
            assert machine.opened["a"] == 1 and loaded(pool) == []
        pool._slots["a"].failures._until = 0
        await use(pool, "a")
        assert machine.opened["a"] == 2 and status_of(pool, "a").status == "loaded"
        await pool.close()

    run(work())


def test_an_engine_that_stays_down_is_noticed_without_a_request() -> None:
    async def work() -> None:
        machine = Machine(a=1)
        pool = machine.pool(1)
        await use(pool, "a")
        machine.engines["a"].status = "stopped"
        await until(lambda: machine.engines["a"].closed)
        assert status_of(pool, "a").status == "failed"
        await pool.close()

    run(work())


def test_unloading_is_refused_while_in_use_unless_forced() -> None:
    async def work() -> None:
        machine = Machine(a=1)
        pool = machine.pool(1)
        async with pool.lease("a"):
            with pytest.raises(ConflictError):
                await pool.unload("a")
            assert loaded(pool) == ["a"]
            await pool.unload("a", force=True)
            assert machine.engines["a"].closed and pool.reserved_bytes == 0
        await pool.unload("a")
        with pytest.raises(UnknownModelError):
            await pool.unload("b")
        await pool.close()

    run(work())


def test_unloading_by_force_ends_a_load_under_way() -> None:
    async def work() -> None:
        machine = Machine(a=1)
        machine.closed_gate("a")
        pool = machine.pool(1)
        waiting = asyncio.create_task(use(pool, "a"))
        await until(lambda: machine.opened["a"] == 1)
        await until(lambda: status_of(pool, "a").progress == 0.5)
        with pytest.raises(ConflictError, match="loaded"):
            await pool.unload("a")
        await pool.unload("a", force=True)
        with pytest.raises(EngineUnavailableError, match="stopped"):
            await waiting
        assert machine.aborted == ["a"] and status_of(pool, "a").status == "unloaded"
        await pool.close()

    run(work())


def test_closing_ends_loads_waits_and_engines_and_refuses_what_comes_later() -> None:
    async def work() -> None:
        machine = Machine(a=1, b=1, c=2)
        pool = machine.pool(2)
        pool._room.wait_s = 60
        await use(pool, "a")
        machine.closed_gate("b")
        loading = asyncio.create_task(use(pool, "b"))
        await until(lambda: machine.opened["b"] == 1)
        waiting = asyncio.create_task(use(pool, "c"))
        await asyncio.sleep(0.02)
        await pool.close()
        await pool.close()
        for task in (loading, waiting):
            with pytest.raises(EngineUnavailableError):
                await task
        with pytest.raises(EngineUnavailableError):
            await use(pool, "a")
        assert machine.engines["a"].closed and machine.aborted == ["b"] and machine.opened["c"] == 0
        assert pool.reserved_bytes == 0

    run(work())


def test_an_adapter_is_loaded_once_in_an_engines_life(tmp_path: Path) -> None:
    async def work() -> None:
        machine = Machine(a=1)
        pool = machine.pool(1)
        pool.set_adapters({"legal": ("a", tmp_path / "one")})

        async def ask() -> None:
            async with pool.lease("legal") as lease:
                assert (lease.name, lease.adapter) == ("a", "legal")
                assert "legal" in lease.engine.adapters()

        await asyncio.gather(*(ask() for _ in range(5)))
        assert machine.engines["a"].adapter_loads == [("legal", tmp_path / "one")]
        await pool.unload("a")
        await ask()
        assert machine.engines["a"].adapter_loads == [("legal", tmp_path / "one")]
        pool.set_adapters({"legal": ("a", tmp_path / "two")})
        await ask()
        assert machine.engines["a"].loaded == {"legal": tmp_path / "two"}
        assert status_of(pool, "a").adapters == ("legal",)
        pool.set_adapters({})
        await until(lambda: machine.engines["a"].loaded == {})
        with pytest.raises(UnknownModelError):
            await ask()
        await pool.close()

    run(work())


def test_an_adapter_that_cannot_be_loaded_fails_its_request_and_nothing_else() -> None:
    async def work() -> None:
        machine = Machine(a=1)
        pool = machine.pool(1)
        pool.set_adapters({"bad": ("a", Path("bad"))})
        await use(pool, "a")

        def refuse(name: str, path: Path) -> None:
            raise ModelFileError(path, "no adapter")

        machine.engines["a"].load_adapter = refuse  # type: ignore[method-assign]
        with pytest.raises(ModelFileError):
            await use(pool, "bad")
        await use(pool, "a")
        await pool.close()

    run(work())


def installed(root: Path, name: str, content: bytes = b"GGUF") -> None:
    (root / name).mkdir(parents=True)
    (root / name / "model.gguf").write_bytes(content)
    manifest = Manifest(
        name=name,
        source=f"hf:org/{name}",
        licence="Apache-2.0",
        notice="",
        pulled_at="2026-01-02T03:04:05+00:00",
        files=(StoredFile(name="model.gguf", size_bytes=len(content), sha256="0" * 64),),
    )
    (root / name / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def test_names_are_those_of_the_store_of_the_operator_and_of_adapters_and_never_paths(tmp_path: Path) -> None:
    machine = Machine(tiny=1)
    pool = machine.pool(1, store=Store(tmp_path))
    installed(tmp_path, "stored")
    installed(tmp_path, "damaged")
    (tmp_path / "damaged" / "model.gguf").write_bytes(b"x")
    pool.set_adapters({"legal": ("stored", Path("x")), "lost": ("gone", Path("x"))})
    assert [one.name for one in pool.listed()] == ["stored", "tiny"]
    assert status_of(pool, "stored").created == 1767323045 and status_of(pool, "stored").size_bytes == 4
    assert status_of(pool, "stored").licence == "Apache-2.0"
    assert pool.resolve("stored").name == "stored" and pool.resolve("legal").adapter == "legal"
    path = str(tmp_path / "stored" / "model.gguf")
    outside = ("../stored", "stored/", "STORED", "", "x" * 10_000, "damaged", "file:stored", "models/tiny")
    for name in (path, f"file:{path}", str(tmp_path / "stored"), *outside):
        with pytest.raises(UnknownModelError) as refusal:
            pool.resolve(name)
        assert len(str(refusal.value)) < 700
    with pytest.raises(UnknownModelError, match="Did you mean stored"):
        pool.resolve("storde")
    with pytest.raises(UnknownModelError, match="ayllu pull smollm2-135m-instruct"):
        pool.resolve("smollm2-135m-instruct")
    with pytest.raises(UnknownModelError, match="lost is an adapter of gone"):
        pool.resolve("lost")


def test_a_model_that_is_pulled_or_removed_while_serving_is_seen_at_once(tmp_path: Path) -> None:
    pool = Machine().pool(1, store=Store(tmp_path))
    with pytest.raises(UnknownModelError):
        pool.resolve("stored")
    installed(tmp_path, "stored")
    assert pool.resolve("stored").name == "stored"
    (tmp_path / "stored" / MANIFEST).unlink()
    with pytest.raises(UnknownModelError):
        pool.resolve("stored")


def test_a_request_without_a_name_means_the_default_or_the_only_model() -> None:
    assert Machine(a=1, b=1).pool(1, default_model="b").resolve(None).name == "b"
    assert Machine(a=1).pool(1, default_model="gone").resolve(None).name == "a"
    with pytest.raises(UnknownModelError, match="gone"):
        Machine(a=1, b=1).pool(1, default_model="gone").resolve(None)
    with pytest.raises(UsageError, match="names no model"):
        Machine(a=1, b=1).pool(1).resolve(None)


SIZES = st.fixed_dictionaries({name: st.integers(1, 3) for name in "abc"})
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["lease", "lease", "leave", "cancel", "load", "unload", "force", "fail", "mend", "down"]
        ),
        st.sampled_from("abc"),
        st.integers(0, 5),
    ),
    min_size=4,
    max_size=30,
)


class Checked(Machine):
    """A machine that holds the pool to its promises while it works."""

    def __init__(self, budget: int, sizes: dict[str, int]) -> None:
        super().__init__(**sizes)
        self.budget = budget
        self.held: Counter[str] = Counter()
        self.forced: set[int] = set()
        self.open_now: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.wrong: list[str] = []

    def open(self, path: Path, options: EngineOptions, /, *, progress: Any, model_name: str) -> PoolEngine:
        with self.lock:
            self.open_now[model_name] += 1
            if self.open_now[model_name] > 1:
                self.wrong.append(f"{model_name} is there twice")
            if sum(self.sizes[name] * count for name, count in self.open_now.items()) > self.budget:
                self.wrong.append("over the budget")
        try:
            engine = super().open(path, options, progress=progress, model_name=model_name)
        except BaseException:
            with self.lock:
                self.open_now[model_name] -= 1
            raise
        close = engine.close

        def checked_close() -> None:
            close()
            with self.lock:
                self.open_now[model_name] -= 1

        engine.close = checked_close  # type: ignore[method-assign]
        return engine


@settings(max_examples=100)
@given(
    STEPS,
    st.integers(2, 6),
    st.fixed_dictionaries({name: st.integers(1, 3) for name in "abc"}),
    st.booleans(),
)
def test_whatever_happens_the_budget_holds_and_what_is_in_use_stays(
    steps: Iterable[tuple[str, str, int]], budget: int, sizes: dict[str, int], keeps: bool
) -> None:
    async def hold(pool: ModelPool, machine: Checked, name: str, done: asyncio.Event) -> None:
        try:
            async with pool.lease(name) as lease:
                engine: Any = lease.engine
                machine.held[name] += 1
                try:
                    await done.wait()
                    if engine.closed and id(engine) not in machine.forced:
                        machine.wrong.append(f"{name} was closed in use")
                finally:
                    machine.held[name] -= 1
        except AylluError:
            pass

    async def work() -> None:
        machine = Checked(budget, sizes)
        pool = machine.pool(budget, keep_alive_s=1000 if keeps else 0)
        pool._room.wait_s = 0.005
        holders: list[tuple[asyncio.Task[None], asyncio.Event]] = []
        for kind, name, number in steps:
            if kind == "lease":
                done = asyncio.Event()
                holders.append((asyncio.create_task(hold(pool, machine, name, done)), done))
            elif kind == "leave" and holders:
                holders[number % len(holders)][1].set()
            elif kind == "cancel" and holders:
                holders[number % len(holders)][0].cancel()
            elif kind == "load":
                await asyncio.gather(pool.load(name), return_exceptions=True)
            elif kind in ("unload", "force"):
                if kind == "force" and name in machine.engines:
                    machine.forced.add(id(machine.engines[name]))
                await asyncio.gather(pool.unload(name, force=kind == "force"), return_exceptions=True)
            elif kind == "fail":
                machine.failing[name] = EngineUnavailableError("no")
            elif kind == "mend":
                machine.failing.pop(name, None)
            elif kind == "down" and name in machine.engines:
                machine.forced.add(id(machine.engines[name]))
                machine.engines[name].status = "stopped"
            if number:
                await until(lambda: all(one.status != "loading" for one in pool.listed()))
                await asyncio.sleep(0.001)
            assert pool.reserved_bytes <= budget
        for _, done in holders:
            done.set()
        await asyncio.wait_for(
            asyncio.gather(*(task for task, _ in holders), return_exceptions=True), timeout=60
        )
        assert all(one.open_requests == 0 for one in pool.listed())
        await pool.close()
        assert machine.wrong == [] and pool.reserved_bytes == 0
        assert sum(machine.open_now.values()) == 0

    run(work())


def real_pool(path: Path, **more: Any) -> ModelPool:
    given = {"options": lambda name: EngineOptions(context=512, threads=1), "keep_alive_s": 1000.0}
    return ModelPool(
        Store(Path("/nonexistent")), budget_bytes=4 << 30, pinned=[("tiny", path)], **{**given, **more}
    )


def test_a_real_model_takes_the_bytes_that_were_told_before_it_was_loaded(smollm2_gguf: Path) -> None:
    async def work() -> None:
        options = EngineOptions(context=512, threads=1)
        told = MemoryEstimate()(smollm2_gguf, options, available_bytes=4 << 30, model_name="tiny")
        pool = real_pool(smollm2_gguf)
        async with pool.lease(None) as lease:
            engine: Any = lease.engine
            assert isinstance(engine, NativeEngine)
            assert engine.info.facts["total_bytes"] == told.total_bytes == pool.reserved_bytes
            assert engine.info.facts["slots"] == told.options.slots
            process_id = engine.process_id
        status = status_of(pool, "tiny")
        assert (status.status, status.context, status.licence) == ("loaded", 512, "apache-2.0")
        await pool.close()
        assert process_id is not None and not running(process_id)

    run(work())


def test_closing_while_a_real_model_loads_ends_its_process(
    smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        pool = real_pool(smollm2_gguf)
        loading = asyncio.create_task(pool.load("tiny"))
        await until(lambda: bool(started) and started[0].process_id is not None)
        process_id = started[0].process_id
        await pool.close()
        with pytest.raises(EngineUnavailableError):
            await loading
        assert process_id is not None and not running(process_id)

    started: list[Any] = []
    from ayllu.engine import native

    class Noted(native.Supervisor):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            started.append(self)

    monkeypatch.setattr(native, "Supervisor", Noted)
    run(work())


def test_a_file_too_large_for_the_budget_is_refused_with_the_parts_of_its_need(smollm2_gguf: Path) -> None:
    with pytest.raises(NoSpaceError, match=r"weights 96\.6 MB .* may take 50\.0 MB"):
        MemoryEstimate()(smollm2_gguf, EngineOptions(), available_bytes=50_000_000, model_name="tiny")
