"""One merge in a process of its own, so that its CPU time and memory are its own.

`python -m fusekit.evaluate.measured_merge RECIPE.json OUT` prints them as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    from fusekit.engine.run import merge
    from fusekit.errors import FusekitError

    recipe, out = Path(sys.argv[1]), sys.argv[2]
    try:
        report = merge(json.loads(recipe.read_text(encoding="utf-8")), out, resume=False)
    except FusekitError as error:
        sys.exit(str(error))
    print(json.dumps({"cpu_seconds": report.cpu_seconds, "peak_bytes": _peak(report.peak_rss)}))


def _peak(reported: int) -> int:
    """This program's own peak: what the kernel counts for a process includes its parent's."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return reported


if __name__ == "__main__":
    main()
