"""Nothing goes out: a server in a network namespace with a loopback device and nothing else answers as ever,
and asks the system for no connection to anywhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("isolated_run.py")
_ADDRESS = re.compile(r'sin6?_addr=inet_(?:addr\("|pton\(AF_INET6, "|pton\(AF_INET6, ")([^"]+)"')
_V6 = re.compile(r'inet_pton\(AF_INET6, "([^"]+)"')


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_a_server_without_a_network_misses_nothing_and_asks_for_nothing(
    tmp_path: Path, smollm2_gguf: Path
) -> None:
    for tool in ("unshare", "strace"):
        assert shutil.which(tool), f"{tool} is needed: scripts/install_test_tools.sh brings it"
    trace = tmp_path / "trace"
    command = [
        "unshare", "--net", "--map-root-user", "--user",
        sys.executable, str(SCRIPT), str(smollm2_gguf), str(tmp_path / "data"), str(trace),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "answered" in done.stdout
    text = trace.read_text(errors="replace")
    assert "socket(" in text or "bind(" in text or "connect(" in text
    reached = {
        address
        for line in text.splitlines()
        if re.search(r"\b(connect|sendto|sendmsg|sendmmsg)\(", line)
        for address in [*_ADDRESS.findall(line), *_V6.findall(line)]
    }
    assert reached <= {"127.0.0.1", "::1"}, reached
