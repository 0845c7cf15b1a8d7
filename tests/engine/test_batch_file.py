"""The files of a batch: whatever bytes they hold, each request is answered exactly once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ayllu.engine.batch import file as batch_file
from ayllu.engine.batch.file import MAX_ID_CHARACTERS, Ids, Line, Survey, parse_line, read_lines, survey
from ayllu.engine.batch.output import Output
from ayllu.errors import UsageError

SHARES_ITS_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def request(custom_id: object, text: str = "hi", **changes: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}]}
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body, **changes}
    return {name: value for name, value in line.items() if value is not None}


def write(path: Path, *lines: object) -> Path:
    path.write_bytes(
        b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)
    )
    return path


def surveyed(path: Path, **options: bool) -> tuple[Survey, Ids]:
    ids = Ids()
    return survey(path, ids, **options), ids


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def answer_all(source: Path, target: Path, *, most: int | None = None, **options: bool) -> list[str | None]:
    """Answer what is left, at most `most` of it; the custom_ids that were answered."""
    _, ids = surveyed(source)
    answered = []
    with Output(target, source, ids, **options) as output:
        for line in read_lines(source):
            if not ids.is_done(line.key) and (most is None or len(answered) < most):
                status = 200 if line.error is None else 400
                output.write(line, status, "r", {"said": line.custom_id})
                answered.append(line.custom_id)
    return answered


def test_a_good_line_is_read(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", request("a"), b"\n", b"  \r\n", request("b"))
    first, second = read_lines(source)
    assert (first.number, first.custom_id, first.url, first.error) == (1, "a", "/v1/chat/completions", None)
    assert first.body == request("a")["body"]
    assert (second.number, second.custom_id) == (4, "b")
    assert first.id != second.id


def test_windows_files_are_read(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbf" + json.dumps(request("a")).encode() + b"\r\n" + json.dumps(request("b")).encode()
    assert [line.custom_id for line in read_lines(write(tmp_path / "in.jsonl", data))] == ["a", "b"]


@pytest.mark.parametrize(
    ("data", "custom_id", "says"),
    [
        (b"{", None, "not valid JSON"),
        (b"[]", None, "JSON object"),
        (request(None), None, "custom_id is missing"),
        (request(""), None, "custom_id is empty"),
        (request("x" * (MAX_ID_CHARACTERS + 1)), None, "too long"),
        (request(7), None, "custom_id is missing or is not a string"),
        (request("a", method=None), "a", "method is missing"),
        (request("a", method="GET"), "a", "Use POST"),
        (request("a", url="/v1/chat/completion"), "a", "Did you mean /v1/chat/completions?"),
        (request("a", url="https://api.openai.com/v1/responses"), "a", "is unknown"),
        (request("a", body="hi"), "a", "body is missing or is not an object"),
        (request("a", body=None), "a", "body is missing"),
        (request("a", metod="POST"), "a", "Did you mean method?"),
    ],
)
def test_a_bad_line_is_marked_with_what_is_wrong(data: object, custom_id: str | None, says: str) -> None:
    line = parse_line(3, data if isinstance(data, bytes) else json.dumps(data).encode())
    assert line.error is not None and says in str(line.error)
    assert (line.custom_id, line.body) == (custom_id, {})
    assert line.key == ("line 3" if custom_id is None else "id a")


def test_an_endless_line_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_file, "MAX_LINE_BYTES", 300)
    monkeypatch.setattr(batch_file, "_PIECE_BYTES", 50)
    source = write(tmp_path / "in.jsonl", request("a"), request("b", "x" * 1000), request("c"), b"x" * 5000)
    lines = list(read_lines(source))
    assert [line.custom_id for line in lines] == ["a", None, "c", None]
    assert "longer than 300 bytes" in str(lines[1].error)


def test_the_id_of_an_answer_is_a_digest_of_the_request(tmp_path: Path) -> None:
    def line_id(value: dict[str, Any]) -> str:
        return parse_line(1, json.dumps(value).encode()).id

    reordered = dict(reversed(request("a").items()))
    assert line_id(request("a")) == line_id(reordered)
    assert len({line_id(request("a")), line_id(request("b")), line_id(request("a", "ho"))}) == 3


def test_the_survey_counts_and_collects_models(tmp_path: Path) -> None:
    body = {"input": "x", "model": "tiny"}
    source = write(
        tmp_path / "in.jsonl", request("a"), b"oops\n", request("b", body=body, url="/v1/embeddings")
    )
    found, _ = surveyed(source)
    assert found == Survey(3, 1, frozenset({"tiny"}))


def test_an_id_that_stands_twice_is_found_before_anything_runs(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", request("a"), request("b"), request("a", method=None))
    with pytest.raises(UsageError, match=r"Lines 1 and 3 of .* custom_id 'a'"):
        surveyed(source)


@pytest.mark.parametrize("bad", [b"oops\n", request("x", url="/v2"), request("x", body={"messages": []})])
def test_strict_refuses_the_file_for_one_bad_line(tmp_path: Path, bad: object) -> None:
    source = write(tmp_path / "in.jsonl", request("a"), bad)
    assert surveyed(source)[0].total == 2
    with pytest.raises(UsageError, match=r"Line 2 of .*in.jsonl is no valid request"):
        surveyed(source, strict=True)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        list(read_lines(tmp_path / "none.jsonl"))
    with pytest.raises(UsageError, match="no ordinary file"):
        list(read_lines(tmp_path))


def test_an_answer_has_the_layout_of_the_api(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", request("a"))
    answer_all(source, tmp_path / "out.jsonl")
    (record,) = records(tmp_path / "out.jsonl")
    assert record == {
        "id": next(read_lines(source)).id,
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "r", "body": {"said": "a"}},
        "error": None,
    }
    assert {file.name for file in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}


def test_what_is_answered_is_done(tmp_path: Path) -> None:
    source = write(
        tmp_path / "in.jsonl", *(request(name) for name in ("a", "b", 'q"\\\u2028京', "d")), b"bad\n"
    )
    target = tmp_path / "out.jsonl"
    assert answer_all(source, target, most=3) == ["a", "b", 'q"\\\u2028京']
    assert answer_all(source, target) == ["d", None]
    assert answer_all(source, target) == []
    assert len(records(target)) == 5


def test_a_torn_line_is_cut_and_computed_again(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", request("a"), request("b"))
    target = tmp_path / "out.jsonl"
    answer_all(source, target)
    whole = target.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        target.write_bytes(whole[:cut])
        assert answer_all(source, target) == ["b"]
        assert target.read_bytes() == whole


def test_zeros_that_a_lost_write_leaves_are_cut(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", request("a"), request("b"))
    target = tmp_path / "out.jsonl"
    answer_all(source, target, most=1)
    target.write_bytes(target.read_bytes() + bytes(3000))
    assert answer_all(source, target) == ["b"]
    assert [record["custom_id"] for record in records(target)] == ["a", "b"]


@pytest.mark.parametrize(
    "content",
    [b"My notes.", b"My notes.\nMore.\n", b'{"custom_id":"a"}\n', b"\n", b'{"id":"x","custom_id":1}\n'],
)
def test_a_file_of_somebody_elses_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    source = write(tmp_path / "in.jsonl", request("a"))
    target = tmp_path / "out.jsonl"
    target.write_bytes(content)
    with pytest.raises(UsageError, match="no answer of `ayllu batch`"):
        answer_all(source, target)
    assert target.read_bytes() == content


def test_input_and_output_are_two_files(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", request("a"))
    (tmp_path / "link.jsonl").symlink_to(source)
    with pytest.raises(UsageError, match="the input itself"):
        answer_all(source, tmp_path / "link.jsonl")
    with pytest.raises(UsageError, match="no ordinary file"):
        answer_all(source, tmp_path)
    with pytest.raises(UsageError, match="no folder"):
        answer_all(source, tmp_path / "no" / "such" / "out.jsonl")
    assert not (tmp_path / "no").exists()


def test_two_runs_cannot_write_one_output(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", request("a"))
    target = tmp_path / "out.jsonl"
    with (
        Output(target, source, surveyed(source)[1]),
        pytest.raises(UsageError, match="Another `ayllu batch`"),
    ):
        answer_all(source, target)
    assert answer_all(source, tmp_path / "out.jsonl") == ["a"]


def test_answers_to_other_requests_are_not_mixed_with_these(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    answer_all(write(tmp_path / "old.jsonl", request("a"), request("b")), target)
    before = target.read_bytes()
    gone = write(tmp_path / "gone.jsonl", request("a"), request("c"))
    with pytest.raises(UsageError, match=r"answers 'b', which is not in .*--force"):
        answer_all(gone, target)
    changed = write(tmp_path / "changed.jsonl", request("a"), request("b", "something else"), request("c"))
    with pytest.raises(UsageError, match=r"Line 2 of .*'b', is not what it was"):
        answer_all(changed, target)
    assert target.read_bytes() == before
    assert answer_all(changed, target, force=True) == ["c"]
    assert target.read_bytes().startswith(before)


def test_a_repaired_line_is_answered_beside_its_old_error(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    answer_all(write(tmp_path / "in.jsonl", b"oops\n", request("b")), target)
    assert answer_all(write(tmp_path / "in.jsonl", request("a"), request("b")), target) == ["a"]


def test_retry_failed_forgets_only_what_the_engine_failed_at(tmp_path: Path) -> None:
    names = ["ok", "bad", "crashed", "full", "gone", "fine"]
    source = write(tmp_path / "in.jsonl", *map(request, names))
    target = tmp_path / "out.jsonl"
    _, ids = surveyed(source)
    with Output(target, source, ids) as output:
        for line, status in zip(read_lines(source), (200, 400, 500, 429, 503, 200), strict=True):
            output.write(line, status, "r", {"n": status})
    assert answer_all(source, target) == []
    assert answer_all(source, target, retry_failed=True) == ["crashed", "full", "gone"]
    assert sorted(record["custom_id"] for record in records(target)) == sorted(names)
    assert [record["response"]["status_code"] for record in records(target)] == [200, 400, 200, 200, 200, 200]


def test_a_write_that_fails_leaves_whole_lines(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", request("a"), request("b"))
    target = tmp_path / "out.jsonl"
    _, ids = surveyed(source)
    with Output(target, source, ids) as output:
        first, second = read_lines(source)
        output.write(first, 200, "r", {})
        file = output._file

        class FullDisk:
            closed = False

            def __getattr__(self, name: str) -> object:
                return getattr(file, name)

            def __enter__(self) -> object:
                return file.__enter__()

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, data: memoryview) -> int:
                if len(data) < 50:
                    raise OSError(28, "No space left on device")
                return file.write(data[:40])

        output._file = FullDisk()
        with pytest.raises(Exception, match=r"disk holding .* is full"):
            output.write(second, 200, "r", {"text": "x" * 200})
        assert len(target.read_bytes().splitlines()) == 2
    assert [record["custom_id"] for record in records(target)] == ["a"]


def test_text_that_is_no_unicode_is_written_all_the_same(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", request("a"))
    _, ids = surveyed(source)
    with Output(tmp_path / "out.jsonl", source, ids) as output:
        output.write(next(read_lines(source)), 200, "r", {"text": "\ud83d"})
    assert records(tmp_path / "out.jsonl")[0]["response"]["body"] == {"text": "\ud83d"}
    assert answer_all(source, tmp_path / "out.jsonl") == []


def test_the_lines_on_the_page_about_batches_are_what_they_seem(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "batch.md").read_text(encoding="utf-8")
    blocks = [block.partition("```")[0] for block in page.split("```json\n")[1:]]
    source = tmp_path / "in.jsonl"
    source.write_text(blocks[0], encoding="utf-8")
    assert surveyed(source, strict=True)[0].total == 2
    answer_all(source, tmp_path / "out.jsonl")
    shown = json.loads(blocks[1])
    assert shown.keys() == records(tmp_path / "out.jsonl")[0].keys()
    assert shown["response"].keys() == records(tmp_path / "out.jsonl")[0]["response"].keys()


LINES = st.one_of(
    st.binary(max_size=40),
    st.builds(
        lambda name, text: json.dumps(request(name, text)).encode(),
        st.sampled_from("abcdef"),
        st.sampled_from(["hi", "ho"]),
    ),
    st.builds(
        lambda name, cut: json.dumps(request(name)).encode()[:cut],
        st.sampled_from("abc"),
        st.integers(0, 150),
    ),
)


@SHARES_ITS_FOLDER
@given(st.lists(LINES, max_size=8), st.binary(max_size=3))
def test_whatever_a_file_holds_each_line_is_a_request_or_marked(
    tmp_path: Path, lines: list[bytes], ending: bytes
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join(lines) + ending)
    found = list(read_lines(source))
    whole = source.read_bytes().removeprefix(b"\xef\xbb\xbf")
    assert len(found) == sum(bool(line.strip()) for line in whole.split(b"\n"))
    for line in found:
        assert isinstance(line, Line)
        assert (line.error is None) == bool(line.body)
        assert line.error is None or str(line.error).isprintable()


@SHARES_ITS_FOLDER
@given(
    st.lists(st.text(min_size=1, max_size=6), unique=True, min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 400)), max_size=4),
    st.booleans(),
)
def test_however_often_a_run_is_killed_each_request_is_answered_once(
    tmp_path: Path, names: list[str], kills: list[tuple[int, int]], bad: bool
) -> None:
    source = write(tmp_path / "in.jsonl", *map(request, names), *([b"bad\n"] if bad else []))
    target = tmp_path / "out.jsonl"
    target.unlink(missing_ok=True)
    for answers, lost in kills:
        answer_all(source, target, most=answers)
        # A kill in mid-write leaves the beginning of a line, never a hole before it.
        data = target.read_bytes()
        last = data.rfind(b"\n", 0, len(data) - 1) + 1
        target.write_bytes(data[: max(last, len(data) - lost)])
    answer_all(source, target)
    expected = sorted(names) + ([None] if bad else [])
    assert sorted((r["custom_id"] for r in records(target)), key=lambda i: (i is None, i or "")) == expected


@SHARES_ITS_FOLDER
@given(st.binary(max_size=60))
def test_random_bytes_in_the_output_are_refused_or_cut_and_never_a_crash(tmp_path: Path, tail: bytes) -> None:
    source = write(tmp_path / "in.jsonl", request("a"), request("b"))
    target = tmp_path / "out.jsonl"
    target.unlink(missing_ok=True)
    answer_all(source, target, most=1)
    first = target.read_bytes()
    target.write_bytes(first + tail)
    try:
        answer_all(source, target)
    except UsageError:
        assert target.read_bytes() == first + tail
    else:
        assert [record["custom_id"] for record in records(target)] == ["a", "b"]
