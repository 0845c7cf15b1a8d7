"""Files that users keep here: OpenAI's endpoints."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import Request, Response
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import StreamingResponse

from ayllu.engine.openai.body import InvalidBodyError
from ayllu.errors import NoSpaceError, TooLargeError
from ayllu.server.access import INFERENCE, OWN_INFERENCE, caller
from ayllu.server.bodies import body_pieces
from ayllu.server.replies import JsonReply
from ayllu.server.routes.common import new_router, services_of
from ayllu.server.state import uploads
from ayllu.server.state.records import StoredUpload

router = new_router("Files")

PURPOSES = ("user_data", "vision", "assistants", "batch", "fine-tune", "evals")
PIECE_BYTES = 1 << 20
FORM_OVERHEAD = 64 << 10


def file_object(one: StoredUpload) -> dict[str, Any]:
    """A file in OpenAI's layout."""
    return {
        "id": one.id,
        "object": "file",
        "bytes": one.size_bytes,
        "created_at": int(one.created_at),
        "expires_at": None if one.expires_at is None else int(one.expires_at),
        "filename": one.name,
        "purpose": one.purpose,
        "status": "processed",
        "status_details": None,
    }


@router.post("/v1/files", response_class=Response, openapi_extra={
    "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": {
        "type": "object",
        "required": ["file", "purpose"],
        "properties": {
            "file": {"type": "string", "format": "binary"},
            "purpose": {"type": "string", "enum": list(PURPOSES)},
        },
    }}}}
})  # fmt: skip
@INFERENCE
async def upload(request: Request) -> Response:
    """Keep a file."""
    services = services_of(request)
    identity = caller(request)
    most = services.settings.upload_bytes
    form = await _form(request, most)
    try:
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise InvalidBodyError(
                "file is missing.", "Send the file as the form field `file`.", param="file"
            )
        if purpose not in PURPOSES:
            raise InvalidBodyError(
                "purpose is missing or unknown.", f"Use one of: {', '.join(PURPOSES)}.", param="purpose"
            )
        expires_at = _expiry(form.get("expires_after[seconds]"))
        size = file.size or 0
        if size > most:
            raise _too_large(most)
        source = file.file

        def pieces() -> Iterator[bytes]:
            source.seek(0)
            while piece := source.read(PIECE_BYTES):
                yield piece

        def store(db: Any) -> StoredUpload:
            if uploads.used_bytes(db, identity.user_id) + size > services.settings.user_bytes:
                raise NoSpaceError("Your files would take more space than you have.", "Delete some first.")
            return uploads.create(
                db,
                user_id=identity.user_id,
                name=(file.filename or "file")[:255],
                purpose=str(purpose),
                media_type=(file.content_type or "application/octet-stream")[:100],
                chunks=pieces(),
                expires_at=expires_at,
            )

        made = await services.database.run(store)
    finally:
        await form.close()
    return JsonReply(file_object(made))


async def _form(request: Request, most: int) -> Any:
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        raise InvalidBodyError("The body is no form.", "Send multipart/form-data.", code="invalid_form")
    stated = request.headers.get("content-length", "0")
    if stated.isdecimal() and int(stated) > most + FORM_OVERHEAD:
        raise _too_large(most)

    pieces = body_pieces(request, most + FORM_OVERHEAD, _too_large(most))
    try:
        parser = MultiPartParser(request.headers, pieces, max_files=1, max_fields=16)  # type: ignore[arg-type]
        return await parser.parse()
    except (MultiPartException, KeyError, ValueError, AssertionError) as error:
        raise InvalidBodyError(
            "The form cannot be read.", "Send multipart/form-data.", code="invalid_form"
        ) from error


def _expiry(given: Any) -> float | None:
    if given is None:
        return None
    if not (isinstance(given, str) and given.isdecimal() and 3600 <= int(given) <= 2_592_000):
        raise InvalidBodyError(
            "expires_after[seconds] is no number from 3600 to 2592000.", "Leave it out to keep the file.",
            param="expires_after",
        )  # fmt: skip
    return time.time() + int(given)


def _too_large(most: int) -> TooLargeError:
    return TooLargeError(f"The file is larger than {most:,} bytes.", "Send a smaller one.")


@router.get("/v1/files", response_class=Response)
@INFERENCE
async def listed(
    request: Request,
    purpose: str | None = None,
    limit: int = 100,
    after: str | None = None,
    order: str = "desc",
) -> Response:
    """The caller's files, newest first."""
    user_id = caller(request).user_id
    most = max(1, min(limit, 1000))
    found = await services_of(request).database.run(
        lambda db: uploads.listed(db, user_id, purpose, most + 1, after), read=True
    )
    page = [file_object(one) for one in found[:most]]
    return JsonReply(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(found) > most,
        }
    )


@router.get("/v1/files/{file_id}", response_class=Response)
@OWN_INFERENCE
async def retrieved(request: Request, file_id: str) -> Response:
    """What is known of a file."""
    user_id = caller(request).user_id
    one = await services_of(request).database.run(lambda db: uploads.get(db, file_id, user_id), read=True)
    return JsonReply(file_object(one))


@router.get("/v1/files/{file_id}/content", response_class=Response)
@OWN_INFERENCE
async def content(request: Request, file_id: str) -> Response:
    """A file's bytes. Always to be saved, never shown: a page in it would have our address."""
    user_id = caller(request).user_id
    data = await services_of(request).database.run(
        lambda db: [*uploads.content(db, file_id, user_id)], read=True
    )
    headers = {
        "content-disposition": "attachment",
        "content-security-policy": "sandbox; default-src 'none'",
        "content-length": str(sum(map(len, data))),
    }
    return StreamingResponse(_pieces(data), media_type="application/octet-stream", headers=headers)


async def _pieces(data: list[bytes]) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


@router.delete("/v1/files/{file_id}", response_class=Response)
@OWN_INFERENCE
async def delete(request: Request, file_id: str) -> Response:
    """Delete a file."""
    user_id = caller(request).user_id
    await services_of(request).database.run(lambda db: uploads.delete(db, file_id, user_id))
    return JsonReply({"id": file_id, "object": "file", "deleted": True})
