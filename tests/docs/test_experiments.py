"""The page of experiments is what its script writes."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytestmark = pytest.mark.torch

from scripts import reproduce_experiments as experiments  # noqa: E402


def figures(**values: list[float]) -> experiments.Figures:
    return experiments.Figures({name.replace("_", " "): own for name, own in values.items()})


def test_the_page_has_the_figures_of_every_study_and_claim() -> None:
    page = experiments.PAGE.read_text(encoding="utf-8")
    generated = page.partition(experiments.BEGIN)[2].partition(experiments.END)[0]
    rows = [line.split("|")[1].strip() for line in generated.splitlines() if line.startswith("|")]
    for study in experiments.STUDIES:
        assert f"| {study} |" in generated
    for text, better, worse in experiments.CLAIMS:
        assert text in rows
        assert better in rows
        assert worse in rows


def test_figures_replace_what_lies_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{experiments.BEGIN}\nold\n{experiments.END}\nafter\n")
    for text in ("first", "second"):
        experiments.replace_figures(page, text)
        assert page.read_text() == (
            f"before\n{experiments.BEGIN}\n\n{text}\n\n{experiments.END}\nafter\n"
        )
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="expected"):
        experiments.replace_figures(page, "text")


def test_claims_say_where_all_seeds_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "CLAIMS", (("a beats b", "a", "b"), ("b beats c", "b", "c")))
    study = figures(a=[3.0, 2.0], b=[1.0, 1.0], c=[2.0, 0.5])
    text = experiments.render({"study": study}, figures(x=[1.0, 1.0]), figures(y=[1.0, 1.0]), 2)
    assert "| a beats b | **+1.5** |" in text
    assert "| b beats c | -0.2 |" in text
    assert "| a | 2.5 ± 0.7 |" in text


def test_turning_images_back_gives_the_images() -> None:
    import torch

    x = torch.rand(3, 8, 8)
    turned = experiments.CHANGES["turned by 270"](experiments.CHANGES["turned by 90"](x))
    assert torch.equal(turned, x)
    for name in ("inverted", "mirrored", "turned by 180", "upside down"):
        twice = experiments.CHANGES[name](experiments.CHANGES[name](x))
        torch.testing.assert_close(twice, x)


def test_depth_runs_from_the_first_to_the_last_block() -> None:
    names = ["embeddings.projection.weight", *(f"encoder.layers.{i}.x" for i in (0, 2, 5))]
    assert [experiments._depth(name, 6) for name in names] == [0.0, 0.0, 0.4, 1.0]
