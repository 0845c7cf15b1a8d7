"""`ayllu bench`: noise is judged, figures are right, peers are named or refused, a real run has its shape."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ayllu.cli.bench import contest as contests
from ayllu.cli.bench import quiet
from ayllu.cli.bench.ceilings import Ceilings, Rate, measure_ceilings
from ayllu.cli.bench.contest import Contest, RunFailedError, decode_rate, quantities, run_contest
from ayllu.cli.bench.cost import TokenCost, token_cost
from ayllu.cli.bench.peers import PEERS, Absent, Contender, find_peers
from ayllu.cli.bench.plan import BenchPlan, Job
from ayllu.cli.bench.quiet import (
    Noise,
    NoiseRule,
    NoiseTally,
    NoisyMachineError,
    Snapshot,
    judged,
    noise_between,
    wait_for_quiet,
)
from ayllu.cli.bench.report import as_json, ratio_of, ratios, render, spread_of, value_text
from ayllu.cli.main import main
from ayllu.errors import UsageError

COST = TokenCost(
    weight_bytes=100_000_000, weights=150_000_000, vocabulary=1000, decode_flops=300, prefill_flops=200
)
CEILINGS = Ceilings(
    2, "native", {1: Rate(30e9, 29e9, 31e9)}, Rate(60e9, 50e9, 61e9), {"int8": Rate(8e11, 7e11, 9e11)}
)
FORCED = NoiseRule(force=True)


def ayllu(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["ayllu", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def snapshot(moment: float, busy: float, **processes: float) -> Snapshot:
    named = {number: (name, seconds) for number, (name, seconds) in enumerate(processes.items())}
    return Snapshot(moment, busy, named)


# ---- noise


def test_own_time_is_no_noise() -> None:
    noise = noise_between(snapshot(0, 100), snapshot(10, 118), own_cpu_s=17.5)
    assert noise.other_cores == pytest.approx(0.05)
    assert not noise.is_above(0.1)


def test_what_was_busy_is_named_busiest_first_and_ourselves_not() -> None:
    before = snapshot(0, 0, bench=0, ffmpeg=5, quiet=1, cc1plus=0)
    after = snapshot(10, 25, bench=10, ffmpeg=8, quiet=1, cc1plus=6)
    noise = noise_between(before, after, own_cpu_s=10, own_ids=(0,))
    assert noise.other_cores == pytest.approx(1.5)
    assert [name for name, _ in noise.busiest] == ["cc1plus (3)", "ffmpeg (1)"]
    assert "cc1plus (3) 0.60" in noise.text()


def test_processes_that_ended_meanwhile_still_count() -> None:
    noise = noise_between(snapshot(0, 0), snapshot(10, 5), own_cpu_s=0)
    assert noise.other_cores == pytest.approx(0.5)
    assert "ended meanwhile" in noise.text()


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1e6))
def test_noise_is_never_negative(busy: float, more: float, own: float) -> None:
    assert noise_between(snapshot(0, busy), snapshot(1, busy + more), own).other_cores >= 0


def test_waiting_ends_once_the_machine_is_quiet() -> None:
    states = iter([snapshot(0, 0), snapshot(1, 1), snapshot(2, 1.9), snapshot(3, 1.95)])
    assert wait_for_quiet(60, look=lambda: next(states), pause=lambda _: None) == 3


def test_a_machine_that_stays_busy_is_refused_with_the_name_of_what_is_busy() -> None:
    states = iter([snapshot(second, second, ffmpeg=second) for second in range(100)])
    with pytest.raises(NoisyMachineError, match=r"ffmpeg \(0\) 1\.00.*--force"):
        wait_for_quiet(5, look=lambda: next(states), pause=lambda _: None)


@pytest.fixture
def noises(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What others use during each run from now on, in cores."""
    values: list[float] = []
    monkeypatch.setattr(quiet, "wait_for_quiet", lambda *_: 0.0)
    monkeypatch.setattr(quiet, "noise_between", lambda *_: Noise(values.pop(0)))
    return values


def test_a_disturbed_run_is_run_again(noises: list[float]) -> None:
    noises += [0.8, 0.02]
    runs, tally = iter("ab"), NoiseTally()
    assert judged(lambda: next(runs), NoiseRule(), tally) == "b"
    assert (tally.other_cores, tally.repeated_runs, tally.noisy) == ([0.02], 1, False)


def test_runs_disturbed_again_and_again_give_no_result(noises: list[float]) -> None:
    noises += [0.8] * quiet.TRIES
    with pytest.raises(NoisyMachineError, match="no result"):
        judged(lambda: None, NoiseRule(), NoiseTally())


def test_a_forced_run_is_kept_and_marked(noises: list[float]) -> None:
    noises += [0.8]
    tally = NoiseTally()
    judged(lambda: None, FORCED, tally)
    assert (tally.other_cores, tally.noisy_runs, tally.noisy) == ([0.8], 1, True)


def test_a_forced_run_in_quiet_is_not_marked(noises: list[float]) -> None:
    noises += [0.0]
    tally = NoiseTally()
    judged(lambda: None, FORCED, tally)
    assert not tally.noisy


def test_a_system_that_does_not_tell_is_refused_unless_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blind() -> Snapshot:
        return original(tmp_path)

    original = quiet.take_snapshot
    monkeypatch.setattr(quiet, "take_snapshot", blind)
    with pytest.raises(NoisyMachineError, match="does not tell"):
        quiet._with_noise(lambda: None, NoiseRule(), ())
    tally = NoiseTally()
    judged(lambda: None, FORCED, tally)
    assert tally.noisy, "nobody knows, so it is not called quiet"


def test_this_machine_is_read() -> None:
    taken = quiet.take_snapshot()
    assert taken.busy_s > 0
    assert any(seconds > 0 for _, seconds in taken.processes.values())


# ---- arithmetic


def test_decode_speed_leaves_out_what_came_with_the_first_token() -> None:
    assert decode_rate([(10.0, 3), (10.5, 2), (12.0, 4)]) == pytest.approx(3.0)
    with pytest.raises(RunFailedError):
        decode_rate([(10.0, 8)])


def test_quantities_come_from_moments() -> None:
    jobs = [
        Job("first_token", "first_token_s", ((1, 2),), 1),
        Job("prefill", "prefill_4", ((1, 2, 3, 4),), 1),
        Job("decode", "decode_0", ((1,),), 3),
        Job("clients", "clients_2", ((1,), (2,)), 2),
    ]
    lines = [
        {"event": "ready", "at": 101.0},
        {"event": "job", "key": "first_token_s", "runs": [{"start": 101, "moments": [[101.5, 1]]}]},
        {"event": "job", "key": "prefill_4", "runs": [{"start": 102, "moments": [[102.5, 1]]}]},
        {
            "event": "job",
            "key": "decode_0",
            "runs": [{"start": 103, "moments": [[103.5, 1], [104, 1], [105.5, 1]]}],
        },
        {
            "event": "job",
            "key": "clients_2",
            "runs": [
                {"start": 110, "moments": [[110.5, 1], [111, 1]]},
                {"start": 110, "moments": [[110.7, 1], [112, 1]]},
            ],
        },
        {"event": "memory", "peak_bytes": 5},
    ]  # fmt: skip
    assert quantities(lines, 100.0, jobs) == pytest.approx(
        {
            "load_s": 1.0,
            "first_token_s": 1.5,
            "prefill_4": 8.0,
            "decode_0": 1.0,
            "clients_2": 2.0,
            "clients_2_first_s": 0.6,
            "peak_bytes": 5.0,
        }
    )


def test_a_runner_that_stops_early_has_no_speed() -> None:
    job = Job("decode", "decode_0", ((1,),), 3)
    line = {"event": "job", "key": "decode_0", "runs": [{"start": 0, "moments": [[1, 1], [2, 1]]}]}
    with pytest.raises(RunFailedError, match="2 tokens came instead of 3"):
        quantities([line], 0.0, [job])


def test_a_ratio_above_one_always_means_that_ayllu_is_better() -> None:
    faster = ratio_of([20, 30, 10], [10, 10, 10], higher_is_better=True)
    assert (faster.median, faster.low, faster.high) == (2, 1, 3)
    sooner = ratio_of([0.5, 0.5], [1.0, 2.0], higher_is_better=False)
    assert (sooner.median, sooner.low, sooner.high) == (3, 2, 4)


@given(st.lists(st.floats(0.001, 1e6), min_size=1))
def test_the_median_lies_within_the_spread(values: list[float]) -> None:
    spread = spread_of(values)
    assert spread.low <= spread.median <= spread.high


def test_no_values_have_no_spread() -> None:
    with pytest.raises(ValueError, match="no values"):
        spread_of([])


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1204.4, "tokens/s", "1,204"),
        (23.71, "tokens/s", "23.7"),
        (0.2149, "s", "0.21"),
        (148e6, "bytes", "148 MB"),
    ],
)
def test_values_are_readable(value: float, unit: str, text: str) -> None:
    assert value_text(value, unit) == text


def test_every_round_draws_new_prompts_and_all_contenders_get_the_same() -> None:
    plan = BenchPlan(threads=1, prefill=(32,), depths=(0, 8), clients=(2,))
    assert plan.single_jobs(500, 1) == plan.single_jobs(500, 1)
    assert plan.single_jobs(500, 1) != plan.single_jobs(500, 2)
    for job in (*plan.single_jobs(500, 1), *plan.client_jobs(500, 1)):
        assert all(0 <= token < 500 for prompt in job.prompts for token in prompt)
        assert all(len(prompt) + job.new_tokens <= plan.context for prompt in job.prompts)


def test_the_cost_of_a_token_counts_what_is_read(smollm2_gguf: Path) -> None:
    cost = token_cost(smollm2_gguf)
    assert cost.vocabulary == 49152
    # The embedding is also the head, so all but the file's own tables is read for each token.
    assert 0.97 < cost.weight_bytes / smollm2_gguf.stat().st_size < 1
    assert cost.weights == 134_515_008
    assert cost.decode_flops - cost.prefill_flops == 2 * 49152 * 576
    assert cost.bytes_read("bfloat16") == 2 * cost.weights


# ---- peers


def test_a_peer_that_nobody_knows_is_refused_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], smollm2_gguf: Path
) -> None:
    assert ayllu(monkeypatch, smollm2_gguf, "--peers", "llama.cp") == 2
    assert "Did you mean llama.cpp?" in capsys.readouterr().err


def test_a_missing_model_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ayllu(monkeypatch, "no-such-model") == 3
    assert "no-such-model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--plot", "speed.jpeg"), ".png"),
        (("--peer-file", "gone.gguf"), "gone.gguf"),
        (("--peer-python", "/no/python"), "/no/python"),
    ],
)
def test_wrong_usage_is_told_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    smollm2_gguf: Path,
    arguments: tuple[str, ...],
    says: str,
) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    assert ayllu(monkeypatch, smollm2_gguf, *arguments) == 2
    assert says in capsys.readouterr().err


def test_absent_peers_are_named_with_the_reason(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    present, absent = find_peers(PEERS, model, llama_cpp=tmp_path, probe=lambda _: {"openvino_genai": "1"})
    assert [peer.name for peer in present] == ["openvino-genai"]
    reasons = {one.name: one.reason for one in absent}
    assert "llama-bench" in reasons["llama.cpp"]
    assert "pip install xllamacpp" in reasons["xllamacpp"]


def test_peers_that_read_gguf_alone_say_so_of_a_folder(tmp_path: Path) -> None:
    present, absent = find_peers(PEERS, tmp_path, probe=lambda _: {"transformers": "5", "llama_cpp": "1"})
    assert [peer.name for peer in present] == ["transformers"]
    assert all("folders" in one.reason for one in absent)


def test_a_peer_in_another_environment_is_started_there(tmp_path: Path) -> None:
    other = tmp_path / "python"
    found = {other: {"llama_cpp": "0.3"}}
    present, _ = find_peers(
        ["llama-cpp-python"],
        tmp_path / "m.gguf",
        interpreters=[other],
        probe=lambda path: found.get(path, {}),
    )
    assert present[0].single[0] == str(other)


def test_an_unknown_name_is_refused_by_the_search_too(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Choose from"):
        find_peers(["vllm-metal"], tmp_path)


# ---- contests


def script(tmp_path: Path, name: str, body: str) -> Contender:
    """A contender that is a small Python program."""
    file = tmp_path / f"{name}.py"
    file.write_text(
        "import json, sys, time\n"
        "task = json.load(sys.stdin)\n"
        "def say(**facts): print(json.dumps(facts), flush=True)\n" + body
    )
    return Contender(name, "1", (sys.executable, str(file)))


HONEST = """
say(event="ready", at=time.perf_counter())
for job in task["jobs"]:
    start = time.perf_counter()
    moments = [[time.perf_counter() + 0.001 * number, 1] for number in range(1, job["new_tokens"] + 1)]
    say(event="job", key=job["key"], runs=[{"start": start, "moments": moments}])
print("a line of somebody else's")
say(event="memory", peak_bytes=1000)
"""


def run_scripts(tmp_path: Path, *contenders: Contender, rounds: int = 2) -> Contest:
    plan = BenchPlan(threads=1, prefill=(8,), decode=4, depths=(0,), rounds=rounds)
    return run_contest(tmp_path / "m", 100, plan, contenders, [], FORCED, NoiseTally())


def test_contenders_run_in_turn_and_a_first_round_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    original = contests.run_program

    def noted(command, *rest):
        order.append(Path(command[1]).stem)
        return original(command, *rest)

    monkeypatch.setattr(contests, "run_program", noted)
    found = run_scripts(tmp_path, script(tmp_path, "ayllu", HONEST), script(tmp_path, "peer", HONEST))
    assert order == ["ayllu", "peer"] * 3
    assert {len(values) for values in found.samples["peer"].values()} == {2}
    assert set(found.samples["ayllu"]) == {measure.key for measure in found.plan.measures()}
    assert set(ratios(found)) == {"peer"}


def test_a_peer_that_fails_is_named_with_its_last_words(tmp_path: Path) -> None:
    failing = script(tmp_path, "peer", "raise SystemExit('out of tokens')")
    found = run_scripts(tmp_path, script(tmp_path, "ayllu", HONEST), failing)
    assert [one.name for one in found.contenders] == ["ayllu"]
    assert found.absent == [Absent("peer", "failed: ended with 1: out of tokens")]
    assert set(found.samples) == {"ayllu"}


def test_a_failure_of_ayllu_ends_the_benchmark(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match="out of tokens"):
        run_scripts(tmp_path, script(tmp_path, "ayllu", "raise SystemExit('out of tokens')"))


def test_a_runner_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contests, "LONGEST_RUN_S", 0.5)
    hanging = script(tmp_path, "peer", "time.sleep(10_000)")
    with pytest.raises(RunFailedError, match="longer than"):
        contests.run_program(hanging.single, {}, {}, 1)


def test_the_json_has_what_is_needed_to_judge_and_to_repeat(tmp_path: Path) -> None:
    found = run_scripts(tmp_path, script(tmp_path, "ayllu", HONEST), script(tmp_path, "peer", HONEST))
    found.noise.noisy_runs = 1
    found.absent.append(Absent("other", "not installed"))
    result = json.loads(json.dumps(as_json(found, {"name": "m"}, COST, CEILINGS, FORCED, "0.1")))
    assert set(result) == {
        "format", "date", "command", "ayllu", "machine", "model", "plan", "noise", "ceilings", "absent",
        "contenders",
    }  # fmt: skip
    assert result["noise"]["noisy"] is True
    assert result["noise"]["forced"] is True
    assert result["absent"] == [{"name": "other", "reason": "not installed"}]
    peer = result["contenders"]["peer"]
    assert set(peer["summary"]["decode_0"]) == {"median", "low", "high"}
    assert peer["ayllu_against_it"]["decode_0"]["median"] > 0
    rate = result["contenders"]["ayllu"]["summary"]["decode_0"]["median"]
    assert result["contenders"]["ayllu"]["achieved_per_s"]["decode_0"] == pytest.approx(rate * 100e6)


def test_the_table_names_everyone_and_calls_a_noisy_run_no_result(tmp_path: Path) -> None:
    found = run_scripts(tmp_path, script(tmp_path, "ayllu", HONEST), script(tmp_path, "peer", HONEST))
    found.absent.append(Absent("other", "not installed"))
    found.noise.noisy_runs = 2
    console = Console(width=100, record=True, file=io.StringIO())
    for part in render(found, "a title", COST, CEILINGS):
        console.print(part, highlight=False)
    text = console.export_text()
    for words in ("a title", "prefill 8, tokens/s", "peer", "other: not installed", "60.0 GB/s", "no result"):
        assert words in text, words


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    from ayllu.cli.bench.plot import draw

    found = run_scripts(tmp_path, script(tmp_path, "ayllu", HONEST), script(tmp_path, "peer", HONEST))
    draw(as_json(found, {"name": "m"}, COST, CEILINGS, FORCED, "0.1"), tmp_path / "speed.png")
    with Image.open(tmp_path / "speed.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("L").getcolors(256)) > 10


# ---- the real thing


def test_ceilings_are_measured() -> None:
    found = measure_ceilings(1, 1 << 20, large_bytes=1 << 22)
    assert found.read[1].low > 1e8
    assert found.read_weights is not None
    assert all(rate.median > 1e8 for rate in found.operations.values())


def test_ceilings_are_measured_without_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ayllu.kernels.native.library.native_is_built", lambda: False)
    found = measure_ceilings(2, 1 << 20, large_bytes=1 << 22)
    assert found.by == "numpy"
    assert set(found.read) == {1, 2}
    assert set(found.operations) == {"float32"}


def test_a_real_model_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], smollm2_gguf: Path, tmp_path: Path
) -> None:
    target = tmp_path / "speed.json"
    code = ayllu(
        monkeypatch, smollm2_gguf, "--peers", "none", "--rounds", 1, "--prefill", 16, "--decode", 4,
        "--depth", 0, "--depth", 20, "--concurrency", 2, "--threads", 1, "--force", "--json", target,
    )  # fmt: skip
    assert code == 0
    result = json.loads(target.read_text("utf-8"))
    samples = result["contenders"]["ayllu"]["samples"]
    assert set(samples) == {
        "load_s", "first_token_s", "prefill_16", "decode_0", "decode_20", "clients_2", "clients_2_first_s",
        "peak_bytes",
    }  # fmt: skip
    assert all(len(values) == 1 and values[0] > 0 for values in samples.values())
    assert result["model"]["vocabulary"] == 49152
    assert "decode 4 at depth 20" in capsys.readouterr().out
