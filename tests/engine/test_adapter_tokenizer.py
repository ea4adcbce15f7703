"""Adapters that were trained after their model's vocabulary grew bring the output its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fusekit
from fusekit import CheckpointError
from tests.engine.test_matching import EMBED, HEAD, merge, model
from tests.engine.test_slices_config import adapter, passthrough

TOKENS = [f"t{i}" for i in range(8)]
GROWN = {"target_modules": [], "modules_to_save": ["embed_tokens", "lm_head"]}


def tokenizer(*added: str) -> dict[str, Any]:
    entries = [
        {"id": len(TOKENS) + i, "content": token, "special": True} for i, token in enumerate(added)
    ]
    vocab = {token: i for i, token in enumerate(TOKENS)}
    return {"model": {"type": "WordLevel", "vocab": vocab}, "added_tokens": entries}


def write_tokenizer(folder: str, *added: str, **files: Any) -> str:
    """A tokenizer with added tokens, and further files: texts, or objects for JSON."""
    place = Path(folder)
    (place / "tokenizer.json").write_text(json.dumps(tokenizer(*added)))
    for name, content in files.items():
        path = place / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def base_model(folder: Path, name: str = "base", rows: int = 8, **files: Any) -> str:
    return write_tokenizer(model(folder, name, 1.0, rows=rows), **files)


def saved(rows: int, value: float) -> dict[str, np.ndarray]:
    return {EMBED: np.full((rows, 4), value), HEAD: np.full((rows, 4), value)}


def grown(folder: Path, name: str, *added: str, value: float = 5.0, **files: Any) -> str:
    """An adapter with rows for the base's eight tokens and the added ones, and its tokenizer."""
    made = adapter(folder, name, saved(8 + len(added), value), **GROWN)
    return write_tokenizer(made, *added, **files)


def whole(reference: str) -> dict[str, Any]:
    return passthrough((reference, 0, 3))


def known(out: Path) -> list[str]:
    content = json.loads((out / "tokenizer.json").read_text())
    return [entry["content"] for entry in content["added_tokens"]]


def equal_shares(*references: str) -> dict[str, Any]:
    models = [{"model": reference} for reference in references]
    return {"models": models, "parameters": {"weight": 1.0}}


def test_the_tokenizer_of_a_grown_vocabulary_comes_with_its_rows(tmp_path: Path) -> None:
    base = base_model(
        tmp_path,
        added_tokens__json={"t7": 7},
        tokenizer__model="sentencepiece",
        tokenizer_config__json={"model_max_length": 512},
        LICENSE="terms",
    )
    one = grown(tmp_path, "one", "<x>", "<y>", tokenizer_config__json={"model_max_length": 64})
    out, config, warnings = merge(tmp_path, **whole(f"{base}+{one}"))
    assert out[EMBED].shape == (10, 4)
    assert config["vocab_size"] == 10
    written = {path.name: path for path in (tmp_path / "out").iterdir()}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert written[name].read_bytes() == (Path(one) / name).read_bytes()
    assert not {"added_tokens.json", "tokenizer.model", "adapter_config.json"} & written.keys()
    assert written["LICENSE"].read_text() == "terms"
    (warning,) = warnings
    assert warning == (
        f"the tokenizer is that of the adapter {one}, which knows 2 more token(s) than that of "
        f"{base}, such as '<x>'"
    )
    assert fusekit.verify(tmp_path / "out").ok


def test_rows_that_the_model_kept_in_reserve_count_as_well(tmp_path: Path) -> None:
    base = base_model(tmp_path, rows=12)
    one = write_tokenizer(adapter(tmp_path, "one", saved(12, 3.0), **GROWN), "<x>")
    factors = {"lm_head.lora_A.weight": np.ones((1, 4)), "lm_head.lora_B.weight": np.ones((12, 1))}
    other = write_tokenizer(adapter(tmp_path, "other", factors))
    recipe = {"merge_method": "task_arithmetic", "base_model": base}
    out, config, warnings = merge(
        tmp_path, **recipe, **equal_shares(f"{base}+{one}", f"{base}+{other}")
    )
    assert out[EMBED][8, 0] == 3.0
    assert config["vocab_size"] == 12
    assert known(tmp_path / "out") == ["<x>"]
    assert [w for w in warnings if "the tokenizer is that of" in w]


@pytest.mark.parametrize("rows", [8, 9])
def test_a_tokenizer_with_more_tokens_than_rows_stays_with_its_adapter(
    tmp_path: Path, rows: int
) -> None:
    base = base_model(tmp_path)
    one = write_tokenizer(adapter(tmp_path, "one", saved(rows, 3.0), **GROWN), "<x>", "<y>")
    _, config, _ = merge(tmp_path, **whole(f"{base}+{one}"))
    assert known(tmp_path / "out") == []
    assert config["vocab_size"] == rows


def test_rows_that_a_merge_cuts_off_leave_the_tokenizer_as_it_is(tmp_path: Path) -> None:
    base = base_model(tmp_path)
    one = grown(tmp_path, "one", "<x>")
    recipe = {"merge_method": "task_arithmetic", "base_model": base}
    out, config, warnings = merge(tmp_path, **recipe, **equal_shares(f"{base}+{one}"))
    assert out[EMBED].shape == (8, 4)
    assert config["vocab_size"] == 8
    assert known(tmp_path / "out") == []
    assert all("set tokenizer_source" in warning for warning in warnings)
    _, config, _ = merge(tmp_path, **equal_shares(f"{base}+{one}", base))
    assert (config["vocab_size"], known(tmp_path / "out")) == (8, [])


def test_an_adapter_that_leaves_the_embedding_alone_brings_no_tokenizer(tmp_path: Path) -> None:
    base = base_model(tmp_path, rows=12)
    factors = {"lm_head.lora_A.weight": np.ones((1, 4)), "lm_head.lora_B.weight": np.ones((12, 1))}
    one = write_tokenizer(adapter(tmp_path, "one", factors), "<pad>")
    assert merge(tmp_path, **whole(f"{base}+{one}"))[2] == []
    assert known(tmp_path / "out") == []


def test_a_grown_vocabulary_without_a_tokenizer_is_pointed_out(tmp_path: Path) -> None:
    base = base_model(tmp_path)
    one = adapter(tmp_path, "one", saved(10, 5.0), **GROWN)
    (warning,) = merge(tmp_path, **whole(f"{base}+{one}"))[2]
    assert f"{base}+{one}: the adapter gives the embedding 10 rows and comes without" in warning
    assert known(tmp_path / "out") == []


def test_a_head_that_did_not_grow_with_the_embedding_is_pointed_out(tmp_path: Path) -> None:
    base = base_model(tmp_path)
    factors = {
        "model.embed_tokens.base_layer.weight": np.ones((9, 4)),
        "model.embed_tokens.lora_embedding_A": np.ones((1, 9)),
        "model.embed_tokens.lora_embedding_B": np.ones((4, 1)),
    }
    made = adapter(tmp_path, "one", factors, target_modules=["embed_tokens"])
    one = write_tokenizer(made, "<x>")
    out, _, (warning,) = merge(tmp_path, **whole(f"{base}+{one}"))
    assert (out[EMBED].shape, out[HEAD].shape) == ((9, 4), (8, 4))
    assert f"{base}+{one}: the adapter gives the embedding 9 rows, and the head has 8" in warning
    assert known(tmp_path / "out") == []


def test_an_embedding_that_was_resized_and_not_trained_is_taken(tmp_path: Path) -> None:
    base = base_model(tmp_path)
    one = write_tokenizer(adapter(tmp_path, "one", saved(9, 5.0), target_modules=[]), "<x>")
    out, config, _ = merge(tmp_path, **whole(f"{base}+{one}"))
    assert out[EMBED].shape == out[HEAD].shape == (9, 4)
    assert config["vocab_size"] == 9
    assert known(tmp_path / "out") == ["<x>"]
    wide = {EMBED: np.ones((9, 5))}
    other = write_tokenizer(adapter(tmp_path, "other", wide, target_modules=[]), "<x>")
    with pytest.raises(CheckpointError, match=r"has shape \[9, 5\], .* has \[8, 4\]"):
        fusekit.plan(whole(f"{base}+{other}"))


def test_adapters_that_grew_alike_merge_without_a_conflict(tmp_path: Path) -> None:
    base = base_model(tmp_path)
    one, other = (grown(tmp_path, name, "<x>", "<y>") for name in ("one", "other"))
    (warning,) = merge(tmp_path, **equal_shares(f"{base}+{one}", f"{base}+{other}"))[2]
    assert warning.startswith(f"the tokenizer is that of the adapter {one}")
    assert known(tmp_path / "out") == ["<x>", "<y>"]


def test_adapters_that_grew_differently_are_pointed_out(tmp_path: Path) -> None:
    base = base_model(tmp_path)
    one, other = (grown(tmp_path, name, "<x>", f"<{name}>") for name in ("one", "other"))
    told = merge(tmp_path, **equal_shares(f"{base}+{one}", f"{base}+{other}"))[2]
    assert told[0] == (
        f"the adapters of {base}+{one} and {base}+{other} give 1 row(s) to different tokens, such "
        "as row 9 to '<one>' and '<other>'; set tokenizer_source: union to align them"
    )
    assert known(tmp_path / "out") == ["<x>", "<one>"]


def test_of_several_the_tokenizer_with_most_tokens_is_taken(tmp_path: Path) -> None:
    base = base_model(tmp_path, rows=10)
    few, many = (
        write_tokenizer(adapter(tmp_path, name, saved(10, 3.0), **GROWN), *added)
        for name, added in (("few", ["<x>"]), ("many", ["<x>", "<y>"]))
    )
    merge(tmp_path, **equal_shares(f"{base}+{few}", f"{base}+{many}"))
    assert known(tmp_path / "out") == ["<x>", "<y>"]


def test_a_union_knows_the_tokens_of_every_adapter(tmp_path: Path) -> None:
    base = base_model(tmp_path)
    one = grown(tmp_path, "one", "<x>", value=5.0)
    other = grown(tmp_path, "other", "<y>", "<z>", value=7.0)
    out, config, warnings = merge(
        tmp_path,
        **equal_shares(f"{base}+{one}", f"{base}+{other}"),
        tokenizer_source="union",
    )
    assert known(tmp_path / "out") == ["<x>", "<y>", "<z>"]
    assert config["vocab_size"] == 11
    np.testing.assert_array_equal(out[EMBED][7:, 0], [6.0, 5.0, 7.0, 7.0])
    np.testing.assert_array_equal(out[HEAD][7:, 0], [6.0, 5.0, 7.0, 7.0])
    assert warnings == []


def template_files(out: Path) -> tuple[str | None, str | None]:
    path = out / "chat_template.jinja"
    settings = json.loads((out / "tokenizer_config.json").read_text())
    return (path.read_text() if path.is_file() else None), settings.get("chat_template")


def test_the_template_follows_the_tokenizer_if_it_has_one(tmp_path: Path) -> None:
    base = base_model(tmp_path, chat_template__jinja="{{ 'of the base' }}")
    own = grown(tmp_path, "own", "<x>", tokenizer_config__json={"chat_template": "{{ 'own' }}"})
    none = grown(tmp_path, "none", "<x>", tokenizer_config__json={})
    merge(tmp_path, **whole(f"{base}+{own}"))
    assert template_files(tmp_path / "out") == (None, "{{ 'own' }}")
    merge(tmp_path, **whole(f"{base}+{none}"))
    assert template_files(tmp_path / "out") == ("{{ 'of the base' }}", None)


def test_a_template_may_be_that_of_an_adapter_whose_tokenizer_is_not_taken(tmp_path: Path) -> None:
    base = base_model(tmp_path, tokenizer_config__json={})
    factors = {"lm_head.lora_A.weight": np.ones((1, 4)), "lm_head.lora_B.weight": np.ones((8, 1))}
    one = write_tokenizer(
        adapter(tmp_path, "one", factors), chat_template__jinja="{{ 'of the adapter' }}"
    )
    merge(tmp_path, **whole(f"{base}+{one}"))
    assert template_files(tmp_path / "out") == (None, None)
    merge(tmp_path, **whole(f"{base}+{one}"), chat_template="auto")
    assert template_files(tmp_path / "out") == (None, "{{ 'of the adapter' }}")


def test_a_tokenizer_that_is_a_link_to_elsewhere_is_refused(tmp_path: Path) -> None:
    base = base_model(tmp_path)
    one = Path(grown(tmp_path, "one", "<x>"))
    (tmp_path / "secret.json").write_text("{}")
    (one / "tokenizer_config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match=r"one/tokenizer_config.json: a link out of the"):
        fusekit.plan(whole(f"{base}+{one}"))
