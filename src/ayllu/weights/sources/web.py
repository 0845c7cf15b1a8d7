"""Mirrors on the web: one file at one http(s) address, named in the catalogue together with its hash."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from ayllu.errors import UsageError
from ayllu.weights.sources import base
from ayllu.weights.sources.base import Fetched, Order
from ayllu.weights.sources.safe_names import model_name_from
from ayllu.weights.sources.transfer import Download, download, web_client


@dataclass(frozen=True)
class WebSource:
    """One address and the name its file gets in the store."""

    text: str
    file_name: str

    def __post_init__(self) -> None:
        parts = urlsplit(self.text)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            raise UsageError(f"{self.text!r} is not a plain web address.", "Correct the catalogue.")

    def suggested_name(self) -> str:
        """The file's name without its ending."""
        return model_name_from(self.file_name.rpartition(".")[0])

    def fetch(self, order: Order) -> list[Fetched]:
        """Download, continuing an earlier attempt, and verify."""
        sha256, size = order.pinned.sha256, order.pinned.size_bytes
        if sha256 is None or size is None:
            raise UsageError(f"{self.text} has no pinned hash.", "Correct the catalogue.")
        wanted = Download(self.file_name, self.text, order.folder / f"{sha256}.part", size, sha256=sha256)
        base.require_space(order.folder, wanted.missing_bytes())
        with order.progress.task(order.label, size) as task, web_client(order.limits) as client:
            digest = download(wanted, client, order, task.advance)
        return [Fetched(self.file_name, wanted.path, size, digest)]
