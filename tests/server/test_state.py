"""What the database promises, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.orm import Session as Db

from ayllu.errors import AylluError, ConflictError, NotFoundError, StateError, UsageError
from ayllu.server.state import (
    adapters,
    audit,
    conversations,
    keys,
    options,
    passwords,
    runs,
    sign_in,
    tables,
    uploads,
    users,
)
from ayllu.server.state.database import Database
from ayllu.server.state.records import Run, Scope, User
from tests.server import postgres

T = TypeVar("T")
HOUR = 3600.0
ODD_TEXT = "odd \x00 \ud800 % _ \\ ' \" 東京 é 😀 \u2028"


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    if request.param == "sqlite":
        opened = Database.open(None, tmp_path / "data")
        yield opened
        opened.close()
        return
    if postgres.programs() is None:
        pytest.skip(postgres.HOW_TO_GET_IT)
    server = postgres.shared()
    url = server.new_database()
    opened = Database.open(url, tmp_path / "data")
    yield opened
    opened.close()
    server.drop(url)


@pytest.fixture
def ann(database: Database) -> User:
    return database.now(lambda db: users.create(db, "Ann", "admin"))


@pytest.fixture
def ben(database: Database, ann: User) -> User:
    return database.now(lambda db: users.create(db, "Ben", "user"))


def in_threads(count: int, work: Callable[[int], T]) -> list[T | AylluError]:
    """What `work` gives or refuses in so many threads that start at the same moment."""
    start = threading.Barrier(count)

    def one(number: int) -> T | AylluError:
        start.wait()
        try:
            return work(number)
        except AylluError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


# Users


def test_a_name_is_taken_whatever_its_case_width_or_composition(database: Database, ann: User) -> None:
    for name in ("ann", "ANN", "Ａｎｎ"):
        with pytest.raises(ConflictError, match="there already"):
            database.now(lambda db, name=name: users.create(db, name, "user"))
        found = database.now(lambda db, name=name: users.by_name(db, name))
        assert found == ann
    renamed = database.now(lambda db: users.update(db, ann.id, name="ANN"))
    assert renamed.name == "ANN"


@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb", " a", "a\x00", "\ud800"])
def test_a_name_that_cannot_be_shown_is_refused(database: Database, name: str) -> None:
    with pytest.raises(UsageError):
        database.now(lambda db: users.create(db, name, "user"))


def test_eight_threads_that_want_one_name_get_it_once(database: Database) -> None:
    made = in_threads(8, lambda number: database.now(lambda db: users.create(db, "Same", "user")))
    assert sum(isinstance(one, User) for one in made) == 1
    assert sum(isinstance(one, ConflictError) for one in made) == 7


def test_the_last_enabled_admin_cannot_go(database: Database, ann: User, ben: User) -> None:
    refused: list[Callable[[Db], Any]] = [
        lambda db: users.delete(db, ann.id),
        lambda db: users.update(db, ann.id, role="user"),
        lambda db: users.update(db, ann.id, disabled=True),
    ]
    for work in refused:
        with pytest.raises(ConflictError, match="last enabled admin"):
            database.now(work)
    database.now(lambda db: users.update(db, ben.id, role="admin"))
    database.now(lambda db: users.update(db, ben.id, disabled=True))
    with pytest.raises(ConflictError):
        database.now(lambda db: users.delete(db, ann.id))
    database.now(lambda db: users.update(db, ben.id, disabled=False))
    database.now(lambda db: users.delete(db, ann.id))
    assert [user.name for user in database.now(users.listed)] == ["Ben"]


def test_two_admins_who_demote_each_other_at_once_do_not_both_succeed(database: Database, ann: User) -> None:
    for _ in range(5):
        two = [ann.id, database.now(lambda db: users.create(db, "Second", "admin")).id]
        in_threads(
            2, lambda number, two=two: database.now(lambda db: users.update(db, two[number], role="user"))
        )
        admins = [user.id for user in database.now(users.listed) if user.role == "admin"]
        assert len(admins) == 1
        database.now(lambda db, two=two: [users.update(db, one, role="admin") for one in two])
        database.now(lambda db, two=two: users.delete(db, two[1]))


def test_disabling_ends_sessions_keys_and_links(database: Database, ben: User) -> None:
    _, token = database.now(lambda db: sign_in.new_session(db, ben.id, HOUR, "browser"))
    _, plain = database.now(lambda db: keys.create(db, ben.id, "k", ("inference",)))
    link = database.now(lambda db: sign_in.new_link(db, ben.id, HOUR))
    database.now(lambda db: users.update(db, ben.id, disabled=True))
    database.now(lambda db: users.update(db, ben.id, disabled=False))
    assert database.now(lambda db: sign_in.find_session(db, token)) is None
    assert database.now(lambda db: keys.find(db, plain)) is None
    assert database.now(lambda db: sign_in.redeem_link(db, link)) is None


def test_deleting_a_user_takes_everything_along(database: Database, ben: User) -> None:
    def fill(db: Db) -> None:
        talk = conversations.create(db, ben.id)
        conversations.add_message(db, talk.id, ben.id, None, "user", "hello")
        run = runs.create(db, user_id=ben.id, kind="response", model="m", request={})
        runs.append(db, run.id, 0, [{"n": 0}])
        uploads.create(db, user_id=ben.id, name="f", purpose="p", media_type="t", chunks=[b"x"])
        sign_in.new_session(db, ben.id, HOUR, "")
        sign_in.new_link(db, ben.id, HOUR)
        keys.create(db, ben.id, "k", ("inference",))
        users.link_identity(db, ben.id, "https://issuer", "42")

    database.now(fill)
    database.now(lambda db: users.delete(db, ben.id))
    for table in tables.metadata.sorted_tables:
        if table.name not in ("users", "audit_head"):
            assert database.now(lambda db, table=table: db.execute(select(table)).all()) == [], table.name


def test_a_provider_never_gets_an_account_by_its_name_alone(database: Database, ann: User) -> None:
    def come(name: str, subject: str, admin: bool | None = None) -> User:
        return database.now(lambda db: users.signed_in_by_oidc(db, "iss", subject, name, admin=admin))

    other = come("Ann", "1")
    assert (other.name, other.role) == ("Ann2", "user") and other.id != ann.id
    assert come("Whoever", "1") == other
    assert come("Ann", "1", admin=True).role == "admin"
    assert come("Ann", "1", admin=None).role == "admin"
    assert come("Ann", "1", admin=False).role == "user"
    with pytest.raises(ConflictError):
        database.now(lambda db: users.link_identity(db, ann.id, "iss", "1"))


# Signing in


def test_a_link_signs_in_once_however_many_ask(database: Database, ben: User) -> None:
    for _ in range(5):
        token = database.now(lambda db: sign_in.new_link(db, ben.id, HOUR))
        found = in_threads(
            8, lambda number, token=token: database.now(lambda db: sign_in.redeem_link(db, token))
        )
        assert sum(one == ben for one in found) == 1
        assert found.count(None) == 7


def test_an_expired_link_and_session_are_worth_nothing(database: Database, ben: User) -> None:
    link = database.now(lambda db: sign_in.new_link(db, ben.id, -1))
    assert database.now(lambda db: sign_in.redeem_link(db, link)) is None
    _, token = database.now(lambda db: sign_in.new_session(db, ben.id, -1, ""))
    assert database.now(lambda db: sign_in.find_session(db, token)) is None
    assert database.now(lambda db: sign_in.sessions_of(db, ben.id)) == []
    assert database.now(lambda db: sign_in.expire(db, time.time())) == 2


def test_a_session_ends_for_its_owner_alone(database: Database, ann: User, ben: User) -> None:
    session, token = database.now(lambda db: sign_in.new_session(db, ben.id, HOUR, "browser"))
    with pytest.raises(NotFoundError):
        database.now(lambda db: sign_in.end_session(db, session.id, ann.id))
    assert database.now(lambda db: sign_in.find_session(db, token), read=True) == (session, ben)
    database.now(lambda db: sign_in.end_session(db, session.id, ben.id))
    assert database.now(lambda db: sign_in.find_session(db, token), read=True) is None


def test_the_oldest_session_ends_when_there_are_too_many(
    database: Database, ben: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sign_in, "MAX_SESSIONS", 3)
    tokens = [database.now(lambda db: sign_in.new_session(db, ben.id, HOUR, ""))[1] for _ in range(5)]
    alive = [database.now(lambda db, t=token: sign_in.find_session(db, t)) is not None for token in tokens]
    assert alive == [False, False, True, True, True]


def test_no_secret_is_in_the_database(database: Database, ben: User) -> None:
    shown = [
        database.now(lambda db: sign_in.new_link(db, ben.id, HOUR)),
        database.now(lambda db: sign_in.new_session(db, ben.id, HOUR, ""))[1],
        database.now(lambda db: keys.create(db, ben.id, "k", ("inference",)))[1][13:],
    ]
    for table in tables.metadata.sorted_tables:
        everything = repr(database.now(lambda db, table=table: db.execute(select(table)).all()))
        assert not [secret for secret in shown if secret in everything]


def test_a_password_is_verified_and_nobodys_takes_the_same_work() -> None:
    stored = passwords.hash_password("correct horse")
    assert stored.startswith("$argon2id$")
    assert passwords.verify_password(stored, "correct horse")
    assert not passwords.verify_password(stored, "wrong")
    assert not passwords.verify_password(None, "nobody's")
    assert not passwords.verify_password("no hash", "x")


# Keys


def test_a_key_is_found_until_it_is_revoked_or_expires(database: Database, ben: User) -> None:
    scopes: tuple[Scope, ...] = ("models", "inference")
    key, plain = database.now(lambda db: keys.create(db, ben.id, "k", scopes, limits={"a": 1}))
    assert key.scopes == scopes and key.limits == {"a": 1}
    assert plain.startswith("ay-") and len(plain) == 46 and plain.startswith(key.prefix)
    assert database.now(lambda db: keys.find(db, plain), read=True) == (key, ben)
    assert database.now(lambda db: keys.find(db, plain + "x"), read=True) is None
    database.now(lambda db: keys.touch(db, {key.id: 5.0}))
    database.now(lambda db: keys.touch(db, {key.id: 4.0}))
    assert database.now(lambda db: keys.get(db, key.id, ben.id)).last_used_at == 5.0
    database.now(lambda db: keys.revoke(db, key.id, None))
    assert database.now(lambda db: keys.find(db, plain), read=True) is None
    _, expired = database.now(lambda db: keys.create(db, ben.id, "k", ("inference",), time.time() - 1))
    assert database.now(lambda db: keys.find(db, expired), read=True) is None


@pytest.mark.parametrize("scopes", [(), ("root",)])
def test_a_key_needs_scopes_that_exist(database: Database, ben: User, scopes: Any) -> None:
    with pytest.raises(UsageError):
        database.now(lambda db: keys.create(db, ben.id, "k", scopes))


# Ownership


def test_nothing_of_another_user_exists(database: Database, ann: User, ben: User) -> None:
    def fill(db: Db) -> dict[str, str]:
        talk = conversations.create(db, ben.id, title="secret")
        message = conversations.add_message(db, talk.id, ben.id, None, "user", "secret")
        run = runs.create(db, user_id=ben.id, kind="response", model="m", request={})
        upload = uploads.create(db, user_id=ben.id, name="f", purpose="p", media_type="t", chunks=[b"secret"])
        key, _ = keys.create(db, ben.id, "k", ("inference",))
        return dict(talk=talk.id, message=message.id, run=run.id, upload=upload.id, key=key.id)

    ids = database.now(fill)
    own = database.now(lambda db: conversations.create(db, ann.id))
    refused: list[Callable[[Db, dict[str, str]], Any]] = [
        lambda db, i: conversations.get(db, i["talk"], ann.id),
        lambda db, i: conversations.messages(db, i["talk"], ann.id),
        lambda db, i: conversations.update(db, i["talk"], ann.id, title="x"),
        lambda db, i: conversations.delete(db, i["talk"], ann.id),
        lambda db, i: conversations.add_message(db, i["talk"], ann.id, None, "user", "x"),
        lambda db, i: conversations.add_message(db, own.id, ann.id, i["message"], "user", "x"),
        lambda db, i: conversations.update(db, own.id, ann.id, head_id=i["message"]),
        lambda db, i: conversations.set_content(db, i["message"], ann.id, "x"),
        lambda db, i: runs.get(db, i["run"], ann.id),
        lambda db, i: runs.events(db, i["run"], ann.id, -1, 10),
        lambda db, i: runs.delete(db, i["run"], ann.id),
        lambda db, i: uploads.get(db, i["upload"], ann.id),
        lambda db, i: uploads.content(db, i["upload"], ann.id),
        lambda db, i: uploads.delete(db, i["upload"], ann.id),
        lambda db, i: uploads.listed(db, ann.id, after=i["upload"]),
        lambda db, i: keys.get(db, i["key"], ann.id),
        lambda db, i: keys.revoke(db, i["key"], ann.id),
    ]
    nowhere = dict.fromkeys(ids, "nowhere\x00")
    for number, work in enumerate(refused):
        told = []
        for given in (ids, nowhere):
            with pytest.raises(NotFoundError) as caught:
                database.now(lambda db, work=work, given=given: work(db, given))
            told.append(str(caught.value))
        assert told[0] == told[1], number
    assert database.now(lambda db: conversations.listed(db, ann.id, query="secret", limit=9)) == []
    assert database.now(lambda db: runs.listed(db, ann.id, 9)) == []
    assert database.now(lambda db: uploads.listed(db, ann.id)) == []
    assert database.now(lambda db: keys.listed(db, ann.id)) == []


# Conversations


SEARCHES: list[tuple[str, list[str]]] = [
    ("京都", ["trip"]),
    ("の紅", ["trip"]),
    ("TRIP", ["trip"]),
    ("straße", ["street"]),
    ("STRASSE", ["street"]),
    ("50%", ["sale"]),
    ("5_%", []),
    ("a_b", ["sale"]),
    ("\\", ["sale"]),
    ("ｓａｌｅ", ["sale"]),
    ("secret.png", []),
]


def test_search_finds_words_of_titles_and_messages(database: Database, ben: User) -> None:
    def fill(db: Db) -> None:
        for title, message in (
            ("trip", "京都の紅葉"),
            ("street", "Straße"),
            ("sale", "50% off a_b \\ 500"),
        ):
            talk = conversations.create(db, ben.id, title=title)
            parts = [{"type": "input_text", "text": message}, {"type": "image", "image_url": "secret.png"}]
            conversations.add_message(db, talk.id, ben.id, None, "user", parts)

    database.now(fill)
    for query, found in SEARCHES:
        got = database.now(lambda db, q=query: conversations.listed(db, ben.id, query=q, limit=9), read=True)
        assert [one.title for one in got] == found, query


def test_conversations_come_newest_first_with_the_pinned_before_all_pages(
    database: Database, ben: User
) -> None:
    made = [database.now(lambda db, n=n: conversations.create(db, ben.id, title=str(n))) for n in range(6)]
    database.now(lambda db: conversations.update(db, made[1].id, ben.id, pinned=True))
    page = database.now(lambda db: conversations.listed(db, ben.id, limit=3))
    assert [one.title for one in page] == ["1", "5", "4", "3"]
    rest = database.now(lambda db: conversations.listed(db, ben.id, limit=3, before=page[-1].updated_at))
    assert [one.title for one in rest] == ["2", "0"]


def test_messages_form_a_tree_and_keep_odd_text(database: Database, ben: User) -> None:
    talk = database.now(lambda db: conversations.create(db, ben.id, title=ODD_TEXT))
    assert talk.title == ODD_TEXT.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    content = [{"type": "input_text", "text": ODD_TEXT}]

    def add(parent: str | None) -> Any:
        return database.now(
            lambda db: conversations.add_message(db, talk.id, ben.id, parent, "user", content)
        )

    first = add(None)
    brothers = [add(first.id), add(first.id)]
    stored = database.now(lambda db: conversations.messages(db, talk.id, ben.id))
    assert stored == [first, *brothers] and stored[0].content == content
    changed = database.now(lambda db: conversations.update(db, talk.id, ben.id, head_id=brothers[1].id))
    assert changed.head_id == brothers[1].id and changed.title == talk.title
    edited = database.now(lambda db: conversations.set_content(db, first.id, ben.id, "new words"))
    assert edited.content == "new words"
    assert len(database.now(lambda db: conversations.listed(db, ben.id, query="NEW w", limit=1))) == 1


def test_messages_added_at_once_are_all_there_in_one_order(database: Database, ben: User) -> None:
    talk = database.now(lambda db: conversations.create(db, ben.id))
    made = in_threads(
        8,
        lambda n: [
            database.now(lambda db: conversations.add_message(db, talk.id, ben.id, None, "user", str(n)))
            for _ in range(4)
        ],
    )
    assert not [one for one in made if isinstance(one, AylluError)]
    assert len(database.now(lambda db: conversations.messages(db, talk.id, ben.id))) == 32


# Runs


def new_run(database: Database, user: User, **more: Any) -> Run:
    return database.now(
        lambda db: runs.create(db, user_id=user.id, kind="response", model="m", request={"a": 1}, **more)
    )


def test_events_are_read_again_from_any_number(database: Database, ben: User) -> None:
    run = new_run(database, ben)
    for first, size in ((0, 3), (3, 1), (4, 4)):
        batch = [{"number": number, "text": ODD_TEXT} for number in range(first, first + size)]
        database.now(lambda db, first=first, batch=batch: runs.append(db, run.id, first, batch))
    for after in range(-1, 9):
        for limit in (1, 2, 100):
            got = database.now(lambda db, a=after, n=limit: runs.events(db, run.id, ben.id, a, n))
            assert [number for number, _ in got] == list(range(after + 1, 8))[:limit]
            assert all(event == {"number": number, "text": ODD_TEXT} for number, event in got)
    assert database.now(lambda db: runs.get(db, run.id, ben.id)).events == 8


def test_events_stored_twice_are_there_once_and_gaps_are_refused(database: Database, ben: User) -> None:
    run = new_run(database, ben)
    for _ in range(2):
        database.now(lambda db: runs.append(db, run.id, 0, [{"n": 0}, {"n": 1}]))
    with pytest.raises(ConflictError, match="2 comes next"):
        database.now(lambda db: runs.append(db, run.id, 3, [{"n": 3}]))
    with pytest.raises(NotFoundError):
        database.now(lambda db: runs.append(db, "nowhere", 0, [{}]))
    assert len(database.now(lambda db: runs.events(db, run.id, ben.id, -1, 9))) == 2


def test_a_run_ends_once(database: Database, ben: User) -> None:
    run = new_run(database, ben)
    database.now(lambda db: runs.set_status(db, run.id, "queued"))
    database.now(lambda db: runs.finish(db, run.id, "completed", {"r": 1}, None))
    for work in (
        lambda db: runs.finish(db, run.id, "failed", None, {}),
        lambda db: runs.set_status(db, run.id, "running"),
    ):
        with pytest.raises(ConflictError, match="has ended"):
            database.now(work)
    got = database.now(lambda db: runs.get(db, run.id, ben.id))
    assert (got.status, got.result, got.error) == ("completed", {"r": 1}, None)
    assert got.ended_at is not None


def test_a_start_marks_what_had_not_ended(database: Database, ann: User, ben: User) -> None:
    ended, running, queued = (new_run(database, user) for user in (ben, ben, ann))
    database.now(lambda db: runs.finish(db, ended.id, "completed", {}, None))
    database.now(lambda db: runs.set_status(db, queued.id, "queued"))
    marked = database.now(lambda db: runs.interrupt_all(db, lambda run: {"said": run.id}))
    assert {run.id for run in marked} == {running.id, queued.id}
    assert all(run.status == "interrupted" and run.result == {"said": run.id} for run in marked)
    assert database.now(lambda db: runs.interrupt_all(db, lambda run: None)) == []


def test_old_runs_are_forgotten_and_a_taken_id_is_refused(database: Database, ben: User) -> None:
    run = new_run(database, ben, id="resp_1", expires_at=time.time() + HOUR)
    with pytest.raises(ConflictError):
        new_run(database, ben, id="resp_1")
    assert database.now(lambda db: runs.expire(db, time.time() + 2 * HOUR)) == 0
    database.now(lambda db: runs.finish(db, run.id, "completed", None, None))
    assert database.now(lambda db: runs.expire(db, time.time())) == 0
    assert database.now(lambda db: runs.expire(db, time.time() + 2 * HOUR)) == 1
    pages = [new_run(database, ben) for _ in range(3)]
    newest = database.now(lambda db: runs.listed(db, ben.id, 2))
    assert [one.id for one in newest] == [pages[2].id, pages[1].id]
    rest = database.now(lambda db: runs.listed(db, ben.id, 2, newest[-1].created_at))
    assert [one.id for one in rest] == [pages[0].id]


# Uploads


def test_a_file_comes_back_to_the_byte(database: Database, ben: User) -> None:
    total = 0
    for sizes in ((), (1,), (1 << 20,), (700_000,) * 5, (3_000_001,), (0, 1, 0)):
        pieces = [bytes([number + 1, 0, 255]) * (size // 3 + 1) for number, size in enumerate(sizes)]
        pieces = [piece[:size] for piece, size in zip(pieces, sizes, strict=True)]
        made = database.now(
            lambda db, pieces=pieces: uploads.create(
                db, user_id=ben.id, name=ODD_TEXT, purpose="p", media_type="t", chunks=pieces
            )
        )
        rows = database.now(lambda db, made=made: [*uploads.content(db, made.id, ben.id)], read=True)
        assert b"".join(rows) == b"".join(pieces)
        assert all(len(row) == 1 << 20 for row in rows[:-1])
        assert made.size_bytes == sum(sizes)
        total += sum(sizes)
    assert database.now(lambda db: uploads.used_bytes(db, ben.id)) == total


def test_files_are_listed_by_page_and_expire(database: Database, ben: User) -> None:
    def keep(purpose: str, expires_at: float | None = None) -> str:
        return database.now(
            lambda db: uploads.create(
                db, user_id=ben.id, name="f", purpose=purpose, media_type="t", chunks=[b"x"],
                expires_at=expires_at,
            )
        ).id  # fmt: skip

    ids = [keep("a"), keep("b"), keep("a")]
    old = keep("a", time.time() - 1)
    listed = lambda **more: [one.id for one in database.now(lambda db: uploads.listed(db, ben.id, **more))]  # noqa: E731
    assert listed() == ids[::-1]
    assert listed(purpose="a") == [ids[2], ids[0]]
    assert listed(after=ids[2], limit=1) == [ids[1]]
    with pytest.raises(NotFoundError):
        database.now(lambda db: uploads.get(db, old, ben.id))
    assert database.now(lambda db: uploads.expire(db, time.time())) == 1
    assert database.now(lambda db: uploads.used_bytes(db, ben.id)) == 3


# Settings and adapters


def test_settings_and_adapters_are_kept(database: Database) -> None:
    for value in (1, [1, "x"], False):
        database.now(lambda db, value=value: options.put(db, "a", value, "ann"))
    database.now(lambda db: options.put(db, "b", "x", "ann"))
    assert database.now(options.all_of, read=True) == {"a": False, "b": "x"}
    database.now(lambda db: options.remove(db, "b"))
    assert database.now(options.all_of, read=True) == {"a": False}
    made = database.now(lambda db: adapters.create(db, "law", "llama", "/somewhere"))
    with pytest.raises(ConflictError):
        database.now(lambda db: adapters.create(db, "law", "llama", "/elsewhere"))
    assert database.now(adapters.listed) == [made]
    database.now(lambda db: adapters.delete(db, "law"))
    with pytest.raises(NotFoundError):
        database.now(lambda db: adapters.delete(db, "law"))


# The audit log


def write_lines(database: Database, count: int = 5) -> None:
    for number in range(count):
        database.now(
            lambda db, n=number: audit.record(db, "ann", "act", ODD_TEXT, {"n": n, "text": ODD_TEXT})
        )


def test_lines_of_many_writers_form_one_chain(database: Database) -> None:
    made = in_threads(8, lambda number: write_lines(database))
    assert not [one for one in made if isinstance(one, AylluError)]
    assert database.now(audit.verify, read=True) == 40
    lines = database.now(lambda db: audit.listed(db, 10, 5), read=True)
    assert [line.number for line in lines] == [11, 12, 13, 14, 15]
    assert lines[1].previous_hash == lines[0].hash and lines[0].details["text"] == ODD_TEXT


class Undo(Exception):
    """Ends a transaction that should leave nothing."""


def test_any_changed_character_of_a_line_is_found(database: Database) -> None:
    write_lines(database)
    table = tables.audit
    row = database.now(lambda db: db.execute(select(table).where(table.c.number == 3)).one())
    changed: list[tuple[str, Any]] = [("number", 1003), ("at", row.at + 1e-6)]
    for column in ("actor", "action", "target", "details", "previous_hash", "hash"):
        value = getattr(row, column)
        changed += [
            (column, value[:at] + chr(ord(value[at]) ^ 1) + value[at + 1 :]) for at in range(len(value))
        ]

    def tamper(db: Db, column: str, other: Any) -> None:
        db.execute(update(table).where(table.c.number == 3).values({column: other}))
        with pytest.raises(StateError, match=r"Line [34] of the audit log"):
            audit.verify(db)
        raise Undo

    for column, other in changed:
        with pytest.raises(Undo):
            database.now(lambda db, c=column, o=other: tamper(db, c, o))
    assert database.now(audit.verify) == 5


def test_a_missing_line_is_found_the_last_one_too(database: Database) -> None:
    write_lines(database)

    def tamper(db: Db, number: int) -> None:
        db.execute(tables.audit.delete().where(tables.audit.c.number == number))
        with pytest.raises(StateError, match=r"missing|cut off"):
            audit.verify(db)
        raise Undo

    for number in range(1, 6):
        with pytest.raises(Undo):
            database.now(lambda db, n=number: tamper(db, n))


def test_any_flipped_byte_of_the_file_under_a_line_is_found(tmp_path: Path) -> None:
    database = Database.open(None, tmp_path)
    write_lines(database, 3)
    database.close()
    file = tmp_path / "ayllu.db"
    whole = file.read_bytes()
    with contextlib.closing(sqlite3.connect(file)) as raw:
        details, sealed = raw.execute("SELECT details, hash FROM audit WHERE number = 2").fetchone()
    at = whole.index(details.encode())
    start, end = (
        at - 60,
        whole.index(sealed.encode(), at) + 64,
    )  # with the record's header and its other texts
    for position in range(start, end, 3):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        tampered = Database.open(None, tmp_path, migrate=False)
        with pytest.raises(StateError):
            tampered.now(audit.verify, read=True)
        tampered.close()


# Transactions


def test_a_refused_transaction_leaves_nothing(database: Database) -> None:
    def half(db: Db) -> None:
        users.create(db, "Half", "user")
        raise ConflictError("no", "no")

    with pytest.raises(ConflictError, match="no no"):
        database.now(half)
    assert database.now(users.count) == 0


def test_a_reading_transaction_cannot_write(database: Database) -> None:
    with pytest.raises(StateError):
        database.now(lambda db: users.create(db, "X", "user"), read=True)
    assert database.now(users.count, read=True) == 0


def test_readers_see_one_state_while_others_write(database: Database, ann: User) -> None:
    def read(db: Db) -> tuple[int, int]:
        before = users.count(db)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(database.now, lambda other: users.create(other, "Later", "user")).result()
        return before, users.count(db)

    assert database.now(read, read=True) == (1, 1)
    assert database.now(users.count, read=True) == 2


def test_the_event_loop_goes_on_while_the_database_works(database: Database) -> None:
    async def check() -> int:
        release = threading.Event()
        slow = asyncio.create_task(database.run(lambda db: release.wait(60)))
        await asyncio.sleep(0)
        read = await database.run(users.count, read=True)
        release.set()
        assert await slow
        return read

    assert asyncio.run(check()) == 0


def test_a_lost_update_cannot_happen(database: Database, ann: User) -> None:
    def count_up(number: int) -> None:
        for _ in range(20):
            database.now(
                lambda db: db.execute(
                    update(tables.users)
                    .where(tables.users.c.id == ann.id)
                    .values(created_at=tables.users.c.created_at + 1)
                )
            )

    database.now(lambda db: db.execute(update(tables.users).values(created_at=0)))
    assert in_threads(8, count_up) == [None] * 8
    assert database.now(lambda db: users.get(db, ann.id)).created_at == 160


def test_a_database_error_tells_no_statement_and_no_value(database: Database) -> None:
    with pytest.raises(StateError) as caught:
        database.now(lambda db: db.execute(text("SELECT nonsense('hush-hush') FROM nowhere")))
    assert "hush" not in str(caught.value) and "SELECT" not in str(caught.value)


def test_a_closed_database_says_so(tmp_path: Path) -> None:
    async def check() -> None:
        database = Database.open(None, tmp_path)
        database.close()
        with pytest.raises(StateError, match="closed"):
            await database.run(users.count)

    asyncio.run(check())


@pytest.mark.skipif(postgres.programs() is None, reason=postgres.HOW_TO_GET_IT)
def test_connections_that_were_lost_meanwhile_are_replaced(tmp_path: Path) -> None:
    url = postgres.shared().new_database()
    database, other = Database.open(url, tmp_path), Database.open(url, tmp_path)
    others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
    for number in range(3):
        assert database.now(users.count, read=True) == number
        other.now(lambda db: db.execute(text(others + " AND datname = current_database()")).all())
        database.now(lambda db, n=number: users.create(db, f"user{n}", "user"))
        other.now(lambda db: db.execute(text(others + " AND datname = current_database()")).all())
    other.now(lambda db: db.execute(text(others + " AND datname = current_database()")).all())
    assert database.now(users.count, read=True) == 3
    database.close()
    other.close()


def test_a_folder_of_others_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    tmp_path.chmod(0o755)
    Database.open(None, tmp_path).close()
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "ayllu.db").stat().st_mode & 0o777 == 0o600
