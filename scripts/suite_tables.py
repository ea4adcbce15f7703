"""Write the results of suites into the tables of a page.

Where the page says `<!-- NAME -->`, what follows up to `<!-- /NAME -->` becomes the comparison in
FOLDER/results.json, as `fusekit suite run ... --out FOLDER` wrote it.

    python -m scripts.suite_tables NAME=FOLDER... [--page docs/suites.md]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fusekit.errors import FusekitError
from fusekit.evaluate.result import read_result
from fusekit.evaluate.table import comparison

PAGE = Path(__file__).parents[1] / "docs" / "suites.md"


def replaced(page: str, name: str, table: str) -> str:
    """The page with a table between the two markers of its name.

    Raises:
        FusekitError: the page does not have both markers, in their order.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = page.partition(begin)
    _, marker, after = rest.partition(end)
    if not found or not marker:
        raise FusekitError(f"expected {begin} and {end} on the page")
    return f"{before}{begin}\n\n{table}\n{end}{after}"


def main() -> None:
    """Rewrite the tables that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    page = arguments.page.read_text(encoding="utf-8")
    try:
        for given in arguments.tables:
            name, _, folder = given.partition("=")
            page = replaced(page, name, comparison(read_result(Path(folder) / "results.json")))
    except FusekitError as error:
        raise SystemExit(str(error)) from None
    arguments.page.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
