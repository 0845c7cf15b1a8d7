"""Small synthetic models, wheels and catalogues for the store's tests."""

from __future__ import annotations

import hashlib
import random
import zipfile
from pathlib import Path

from ayllu.weights.catalogue import Catalogue, parse_catalogue


def gguf_bytes(size: int, seed: int = 0) -> bytes:
    """Bytes that begin like a GGUF file: enough for a store, which never looks further."""
    return b"GGUF" + random.Random(seed).randbytes(size - 4)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def entry_text(
    name: str, data: bytes, *sources: str, file: str = "model.gguf", digest: str | None = None
) -> str:
    """One catalogue entry for `data`. A source is an address, or the inside of a [[model.source]] table."""
    insides = [source if " = " in source else f'at = "{source}"' for source in sources]
    tables = "".join(f"[[model.source]]\n{inside}\n" for inside in insides)
    fields = {"name": name, "file": file, "title": "t", "summary": "s"}
    fields |= {"licence": "Apache-2.0", "notice": "Notice."}
    lines = [f'{key} = "{value}"' for key, value in fields.items()]
    lines += [f'sha256 = "{digest or sha256(data)}"', f"size_bytes = {len(data)}", "context = 128"]
    return "[[model]]\n" + "\n".join(lines) + f"\n{tables}\n"


def folder_text(name: str, files: dict[str, bytes], *sources: str) -> str:
    """One catalogue entry for a model that is a folder of `files`. Sources as in `entry_text`."""
    insides = [source if " = " in source else f'at = "{source}"' for source in sources]
    held = "".join(
        f'[[model.files]]\nname = "{file}"\nsha256 = "{sha256(data)}"\nsize_bytes = {len(data)}\n'
        for file, data in files.items()
    )
    tables = "".join(f"[[model.source]]\n{inside}\n" for inside in insides)
    head = f'name = "{name}"\ntitle = "t"\nsummary = "s"\nlicence = "Apache-2.0"\nnotice = "Notice."\n'
    sizes = f"size_bytes = {sum(map(len, files.values()))}\ncontext = 128\n"
    return f"[[model]]\n{head}{sizes}{held}{tables}\n"


def catalogue_of(*entries: str) -> Catalogue:
    return parse_catalogue("\n".join(entries))


def make_wheel(folder: Path, package: str, version: str, members: dict[str, bytes]) -> Path:
    """A wheel pip accepts, holding `members`."""
    module = package.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            f"{module}/__init__.py", "raise RuntimeError('a model package must never be imported')\n"
        )
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel
