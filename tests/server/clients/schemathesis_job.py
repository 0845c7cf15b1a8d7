"""schemathesis against the server: requests made from /openapi.json, right and wrong ones; none may break it.

CASES is the least number of requests that must have been sent; they are the same ones every time. EXAMPLES is
how many are made up for each operation, beside those at the borders of its fields.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from checks import BASE_URL, KEY, check, report

CASES = int(os.environ.get("CASES", "2000"))
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,unsupported_method,ignored_auth,"
    "use_after_free,ensure_resource_availability"
)
# They would change what everything after them meets.
LEFT_ALONE = r"^/api/settings/|^/api/models/.*/unload"


@check
def no_request_breaks_the_server() -> None:
    with tempfile.TemporaryDirectory() as folder:
        events = Path(folder) / "events.ndjson"
        examples = int(os.environ.get("EXAMPLES", "12"))
        done = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{BASE_URL}/openapi.json"),
                *("--header", f"Authorization: Bearer {KEY}"),
                *("--checks", CHECKS, "--exclude-path-regex", LEFT_ALONE),
                *("--phases", "coverage,fuzzing,stateful", "--max-examples", str(examples)),
                "--generation-deterministic",
                *("--suppress-health-check", "all", "--no-shrink", "--continue-on-failure"),
                *("--workers", "2", "--request-timeout", "120", "--warnings", "off", "--no-color"),
                *("--report", "ndjson", "--report-ndjson-path", str(events)),
            ],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert events.exists(), done.stdout[-3000:] + done.stderr[-3000:]
        statuses = _statuses(events)
    total = sum(statuses.values())
    print(json.dumps({"requests": total, "statuses": dict(sorted(statuses.items()))}), file=sys.stderr)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]
    broken = {status: count for status, count in statuses.items() if status >= 500 and status != 503}
    assert not broken, broken
    assert total >= CASES, f"{total} requests"


def _statuses(events: Path) -> Counter[int]:
    """How often each status was answered, by the events that were written down."""
    found: Counter[int] = Counter()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(value.get("status_code"), int):
                found[value["status_code"]] += 1
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    for line in events.read_text(encoding="utf-8").splitlines():
        walk(json.loads(line))
    return found


if __name__ == "__main__":
    report("schemathesis")
