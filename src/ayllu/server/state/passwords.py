"""Passwords: argon2id, slow on purpose. Never inside a transaction, never on the event loop."""

from __future__ import annotations

import threading
from functools import cache

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError

AT_A_TIME = 2
"""Hashes computed at the same time: each takes 64 MiB, and sign-in is open to everybody."""

_hasher = PasswordHasher()
_turn = threading.BoundedSemaphore(AT_A_TIME)


def hash_password(text: str) -> str:
    """What is stored of a password."""
    with _turn:
        return _hasher.hash(text.encode("utf-8", "surrogatepass"))


def verify_password(stored: str | None, text: str) -> bool:
    """Whether `text` is the password. None: there is no such user; the same work is done, in vain."""
    if stored is None:
        _matches(_nobodys_hash(), text)
        return False
    return _matches(stored, text)


def _matches(stored: str, text: str) -> bool:
    with _turn:
        try:
            return _hasher.verify(stored, text.encode("utf-8", "surrogatepass"))
        except (Argon2Error, InvalidHashError):
            return False


@cache
def _nobodys_hash() -> str:
    return hash_password("nobody's")
