"""What this process knows of itself: its age and its memory. Standard library only."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def age_seconds() -> float:
    """Seconds since this process was started; where the system does not tell, the processor time it used."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError, ValueError, IndexError):
        return time.process_time()


def resident_bytes() -> int:
    """Memory in use now, mapped file pages included; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def peak_resident_bytes(process_id: int | None = None) -> int:
    """The largest `resident_bytes` so far, of this process or another; 0 where the system does not tell."""
    try:
        # Not getrusage: its figure starts at the size of the process that launched this one.
        status = Path(f"/proc/{process_id or 'self'}/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return _peak_by_getrusage() if process_id is None else 0


def _peak_by_getrusage() -> int:
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
