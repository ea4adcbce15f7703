"""Look at models before merging them: how far they moved, how much they agree, what to watch.

python examples/inspect_experts.py
"""

from __future__ import annotations

import fusekit
from fusekit.evaluate import digits


def main() -> None:
    experts = digits.experts()
    found = fusekit.inspect(list(experts.values()), base=digits.base())
    whole = found.whole.statistics
    print("norm of the task vectors, and cosines between them:")
    for task, norm, row in zip(experts, whole.norms, whole.cosine, strict=True):
        print(f"{task:9} {norm:6.2f}  " + " ".join(f"{cosine:5.2f}" for cosine in row))
    for finding in found.findings:
        print(f"{finding.severity}: {finding.text}")


if __name__ == "__main__":
    main()
