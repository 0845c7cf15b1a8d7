"""Secrets that we hand out: made at random, told once, kept as a SHA-256 digest alone."""

from __future__ import annotations

import hashlib
import hmac
import secrets

TOKEN_BYTES = 32


def new_id(kind: str) -> str:
    """An id that says what it names, and nothing more."""
    return f"{kind}_{secrets.token_hex(12)}"


def new_secret(prefix: str = "") -> str:
    """256 random bits as 43 characters. Too many to guess, so a fast digest keeps them well enough."""
    return prefix + secrets.token_urlsafe(TOKEN_BYTES)


def digest(secret: str) -> str:
    """What is stored of a secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def same(stored: str, shown: str) -> bool:
    """Whether two digests are equal, in time that does not tell how nearly."""
    return hmac.compare_digest(stored.encode(), shown.encode())
