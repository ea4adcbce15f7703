"""`fusekit inspect` through the CLI in a fresh process, against copying the bytes it reads.

    python -m benchmarks.inspection --parameters 0.5e9 --models 4 --out bench-out

Copies (read every file through one buffer, write as many bytes as one of them) and inspections take
turns; the least CPU seconds of either count. Start-up (interpreter, imports, cached kernels) is
measured on checkpoints of next to no size and shown apart. Prints one Markdown table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.checkpoints import write_family
from benchmarks.merge import Cost, copy_cost, run_measured


def inspect_cost(family: Path, models: int, threads: int) -> Cost:
    """One inspection of a family against its base in a fresh process."""
    folders = [str(family / f"model{i}") for i in range(models)]
    command = [sys.executable, "-m", "fusekit", "inspect", *folders, "--base", str(family / "base")]
    return run_measured([*command, "--threads", str(threads)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parameters", type=float, default=0.5e9)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    options = parser.parse_args()

    family = options.out / f"dense-{options.parameters / 1e6:.0f}M-{options.models}"
    tiny = options.out / f"tiny-{options.models}"
    for folder, parameters in ((family, options.parameters), (tiny, 0)):
        if not folder.exists():
            write_family(folder, parameters, options.models)
    inspect_cost(tiny, options.models, options.threads)  # compiles and caches the kernels
    files = [folder / "model.safetensors" for folder in sorted(family.iterdir())]
    copies, inspections, starts = [], [], []
    for _ in range(options.repeat):
        copies.append(copy_cost(files, options.out / "copy.bin"))
        inspections.append(inspect_cost(family, options.models, options.threads))
        starts.append(inspect_cost(tiny, options.models, options.threads))
    copy, found, start = (
        min(each, key=lambda cost: cost.cpu) for each in (copies, inspections, starts)
    )
    size = files[0].stat().st_size / 1e9
    print(f"Base and {options.models} models, {size:.2f} GB each, {options.threads} threads.\n")
    print("| copy CPU s | inspect CPU s | start-up CPU s | ratio | ratio with start-up | peak MB |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {copy.cpu:.2f} | {found.cpu:.2f} | {start.cpu:.2f} | "
        f"{(found.cpu - start.cpu) / copy.cpu:.2f} | {found.cpu / copy.cpu:.2f} | "
        f"{max(cost.peak_rss for cost in inspections) / 1e6:.0f} |"
    )


if __name__ == "__main__":
    main()
