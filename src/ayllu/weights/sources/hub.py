"""`hf:org/name[@revision][/file]`: models from a Hugging Face hub, or a mirror named by HF_ENDPOINT.

The hub library asks the questions (what is in the repository, under which digests); our own transfer brings
the bytes, because it resumes and checks SHA-256, where the library checks only sizes. The files land in the
hub's own cache (`HF_HUB_CACHE`), laid out as every other program expects, and the store links to them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import httpx2

from ayllu import __version__
from ayllu.errors import AylluError, IntegrityError, SourceError, UsageError, clip, one_line
from ayllu.weights.sources import base
from ayllu.weights.sources.base import Fetched, Intake, Limits, Order
from ayllu.weights.sources.hub_cache import HubCache, HubFile
from ayllu.weights.sources.hub_choice import choose_files
from ayllu.weights.sources.safe_names import (
    SHA1,
    SHA256,
    model_name_from,
    refuse_unless_model_file,
    safe_offered_name,
)
from ayllu.weights.sources.transfer import Download, download, web_client

_SOURCE = re.compile(
    r"hf:(?P<repository>[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95})"
    r"(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._-]{0,127}))?(?:/(?P<file>.+))?"
)
MOST_FILES = 10_000


@dataclass(frozen=True)
class HubSource:
    """A repository at a revision; `file` names one of its files, None takes the model it holds."""

    repository: str
    revision: str = "main"
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubSource:
        """Read `hf:org/name[@revision][/file]`. A pickle named as the file is refused here."""
        match = _SOURCE.fullmatch(text)
        if not match or ".." in match["repository"] or ".." in (match["revision"] or ""):
            raise UsageError(
                f"{clip(ascii(text))} is not a hub source.",
                "Write hf:org/name, hf:org/name@revision, or hf:org/name/file.gguf.",
            )
        if match["file"] is not None:
            refuse_unless_model_file(match["file"])
        return cls(match["repository"], match["revision"] or "main", match["file"])

    @property
    def text(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"hf:{self.repository}{revision}" + (f"/{self.file}" if self.file else "")

    def suggested_name(self) -> str:
        """The file's stem, or the repository's own name."""
        name = self.file.rpartition("/")[2].rpartition(".")[0] if self.file else ""
        return model_name_from(name or self.repository.partition("/")[2])

    def fetch(self, order: Order) -> list[Fetched]:
        """Bring the files into the hub cache, verify them, and return where they lie.

        What the cache already holds is verified and used; when the hub cannot be reached, a complete and
        verifiable snapshot in the cache is enough.
        """
        _quiet_library()
        cache = HubCache.of_environment(self.repository)
        try:
            commit, files, licence = self._ask_hub(order)
        except SourceError:
            cached = cache.offline(self.revision, self.file)
            if cached is None:
                raise
            (commit, files), licence = cached, None
        _refuse_other_bytes(files, order)
        with order.progress.task(order.label, sum(file.size_bytes for file in files)) as task:
            digests = {file.name: cache.digest_of(file) for file in files}
            missing = [file for file in files if digests[file.name] is None]
            task.advance(sum(file.size_bytes for file in files) - sum(file.size_bytes for file in missing))
            downloads = {file.name: self._download(file, commit, order) for file in missing}
            if needed := sum(wanted.missing_bytes() for wanted in downloads.values()):
                base.require_space(cache.make_folder(), needed)
            with web_client(order.limits) as client:
                for file in missing:
                    wanted = downloads[file.name]
                    digests[file.name] = download(wanted, client, order, task.advance)
                    cache.admit(wanted.path, file)
        fetched = []
        for file in files:
            digest = digests[file.name]
            assert digest is not None, file.name
            cache.point(commit, file)
            fetched.append(
                Fetched(file.name, cache.blob(file), file.size_bytes, digest, Intake.LINK_OR_POINT, licence)
            )
        cache.note_revision(self.revision, commit)
        return fetched

    def _ask_hub(self, order: Order) -> tuple[str, list[HubFile], str | None]:
        """The commit this revision stands for, the files that make up the model, with size and digest, and
        the licence that the model's card states."""
        from huggingface_hub import HfApi

        endpoint = hub_endpoint()
        if endpoint in order.unreachable:
            raise SourceError(order.unreachable[endpoint], "Check the network, then pull again.")
        with web_client(order.limits):
            pass  # names an unusable proxy or certificate, where the hub library would just fail
        with _typed_errors(self.text, endpoint, order.unreachable):
            info = HfApi(endpoint=endpoint).model_info(
                self.repository, revision=self.revision, files_metadata=True, timeout=_patience(order.limits)
            )
            commit, siblings = info.sha or "", info.siblings or []
            if not SHA1.fullmatch(commit) or len(siblings) > MOST_FILES:
                raise SourceError(f"{endpoint} does not answer like a hub.", "Check HF_ENDPOINT.")
            listed = {
                sibling.rfilename: sibling for sibling in siblings if isinstance(sibling.rfilename, str)
            }
            files = []
            for name in choose_files(self.repository, list(listed), self.file):
                sibling = listed[name]
                digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
                size = sibling.lfs.size if sibling.lfs else sibling.size
                if digest is None or size is None:
                    digest, size = self._ask_for_file(name, commit, endpoint, order.limits)
                files.append(_hub_file(name, digest, size, endpoint))
            return commit, files, _card_licence(info.card_data)

    def _ask_for_file(
        self, name: str, commit: str, endpoint: str, limits: Limits
    ) -> tuple[str | None, int | None]:
        """Digest and size of one file from its own headers, for mirrors whose listing leaves them out."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        address = hf_hub_url(self.repository, name, revision=commit, endpoint=endpoint)
        found = get_hf_file_metadata(address, timeout=_patience(limits), endpoint=endpoint)
        return found.etag, found.size

    def _download(self, file: HubFile, commit: str, order: Order) -> Download:
        from huggingface_hub import hf_hub_url

        is_sha256 = SHA256.fullmatch(file.digest) is not None
        return Download(
            name=file.name,
            url=hf_hub_url(self.repository, file.name, revision=commit, endpoint=hub_endpoint()),
            path=order.folder / f"{file.digest}.part",
            size_bytes=file.size_bytes,
            sha256=file.digest if is_sha256 else None,
            git_blob=None if is_sha256 else file.digest,
            headers=_headers(),
        )


def _card_licence(card: object) -> str | None:
    """The licence a model's card states: its identifier, or the name of one that has none."""
    stated = getattr(card, "license", None)
    if stated == "other":
        stated = getattr(card, "license_name", None) or stated
    return one_line(clip(stated, 80)) if isinstance(stated, str) and stated.strip() else None


def hub_endpoint() -> str:
    """The hub's address: HF_ENDPOINT as it is now, else the library's default."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _headers() -> dict[str, str]:
    """Who is asking, and with whose token: the one the hub library finds, unless it was told not to."""
    from huggingface_hub import constants, get_token

    headers = {"User-Agent": f"ayllu/{__version__}"}
    if not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN and (token := get_token()):
        headers["Authorization"] = f"Bearer {token}"
    return headers


def _quiet_library() -> None:
    """Switch the hub library's telemetry off, whether or not it has been imported already."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True


def _patience(limits: Limits) -> float:
    """A timeout for the hub library, which hands it unread to an HTTP client that takes one per phase."""
    return cast(float, httpx2.Timeout(limits.stall_s, connect=limits.connect_s))


def _hub_file(name: str, digest: str | None, size: int | None, endpoint: str) -> HubFile:
    safe_offered_name(name)
    refuse_unless_model_file(name)
    if digest is None or not (SHA256.fullmatch(digest) or SHA1.fullmatch(digest)):
        raise SourceError(f"{endpoint} gives no digest for {clip(name)}.", "Use another source.")
    if not isinstance(size, int) or not 0 <= size < 1 << 50:
        raise SourceError(f"{endpoint} gives no size for {clip(name)}.", "Use another source.")
    return HubFile(name, size, digest)


def _refuse_other_bytes(files: list[HubFile], order: Order) -> None:
    """Compare what the hub offers with what the catalogue pins, before a byte is fetched."""
    pinned = order.pinned.sha256
    if pinned is not None and [file.digest for file in files] != [pinned]:
        raise IntegrityError(
            f"The hub offers {files[0].name} with digest {files[0].digest[:16]}…, not {pinned[:16]}….",
            "Nothing was fetched. Use another source.",
        )


@contextmanager
def _typed_errors(source: str, endpoint: str, unreachable: dict[str, str]) -> Iterator[None]:
    """Turn whatever the hub library raises into one SourceError with a reason and a fix."""
    from huggingface_hub import errors

    try:
        yield
    except AylluError:
        raise
    except errors.GatedRepoError as error:
        raise SourceError(
            f"{source} is gated: its licence has to be accepted first.",
            "Accept it on the model's page at the hub, create an access token, set HF_TOKEN, and pull again.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(f"{source} has no such revision.", "Check what follows the @.") from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            f"{source} does not exist, or is private.", "Check the spelling; for a private one set HF_TOKEN."
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise SourceError(f"{source}: HF_HUB_OFFLINE is set.", "Unset it to allow downloads.") from error
    except (httpx2.ConnectError, httpx2.TimeoutException, httpx2.ProxyError) as error:
        unreachable[endpoint] = f"{endpoint} cannot be reached ({str(error) or type(error).__name__})."
        raise SourceError(unreachable[endpoint], "Check the network, then pull again.") from error
    except (errors.HfHubHTTPError, httpx2.HTTPError) as error:
        raise SourceError(
            f"{source}: the hub answered with an error: {_first_line(error)}", "Pull again."
        ) from error
    except OSError as error:
        raise SourceError(f"{source}: {_first_line(error)}", "Check the network settings.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        # The library reads the listing without checking it, so a malformed one surfaces as any of these.
        raise SourceError(
            f"{endpoint} does not answer like a hub: {_first_line(error)}", "Check HF_ENDPOINT."
        ) from error


def _first_line(error: Exception) -> str:
    return clip((str(error).strip().splitlines() or [type(error).__name__])[0], 160).rstrip(".") + "."
