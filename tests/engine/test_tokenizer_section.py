"""The tokenizer section and chat templates of a recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import fusekit
from fusekit import CheckpointError, RecipeError, load_recipe
from fusekit.recipe.chat_templates import BUILT_IN
from tests.vectors import FOLDER

INPUTS = FOLDER / "mergekit_e2e/inputs"
A, B = str(INPUTS / "tok_a"), str(INPUTS / "tok_b")
EMBED = "model.embed_tokens.weight"


def merge(folder: Path, **settings: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    recipe = {
        "merge_method": "linear",
        "models": [{"model": A}, {"model": B}],
        "parameters": {"weight": 1.0},
        **settings,
    }
    fusekit.merge(recipe, folder / "out", threads=1)
    config: dict[str, Any] = json.loads((folder / "out/config.json").read_text())
    return load_file(folder / "out/model.safetensors"), config


def vocabulary(folder: Path) -> dict[str, int]:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ids: dict[str, int] = dict(tokenizer["model"]["vocab"])
    return ids | {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}


@pytest.mark.parametrize(("source", "origin"), [("base", A), (B, B)])
def test_another_models_tokenizer_is_kept_as_it_is(
    tmp_path: Path, source: str, origin: str
) -> None:
    merged, config = merge(tmp_path, tokenizer_source=source)
    rows = load_file(Path(origin) / "model.safetensors")[EMBED].shape[0]
    assert merged[EMBED].shape[0] == config["vocab_size"] == rows
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (Path(origin) / name).read_bytes()


def test_a_union_holds_every_token_and_keeps_the_rows_of_each(tmp_path: Path) -> None:
    merged, config = merge(tmp_path, tokenizer={"source": "union"})
    ids, first, second = (vocabulary(Path(p)) for p in (tmp_path / "out", A, B))
    assert set(ids) == set(first) | set(second)
    assert merged[EMBED].shape[0] == config["vocab_size"]
    only = next(token for token in second if token not in first)
    theirs = load_file(Path(B) / "model.safetensors")[EMBED][second[only]]
    np.testing.assert_allclose(merged[EMBED][ids[only]], theirs, atol=1e-6)
    shared = next(token for token in second if token in first)
    mean = (
        load_file(Path(A) / "model.safetensors")[EMBED][first[shared]]
        + load_file(Path(B) / "model.safetensors")[EMBED][second[shared]]
    ) / 2
    np.testing.assert_allclose(merged[EMBED][ids[shared]], mean, atol=1e-6)


def test_a_token_that_nobody_has_is_refused(tmp_path: Path) -> None:
    recipe = {
        "merge_method": "linear",
        "models": [{"model": A}, {"model": A + "/"}],
        "parameters": {"weight": 1.0},
        "tokenizer": {"tokens": {"zzz no such token": {"source": A}}},
    }
    with pytest.raises(RecipeError, match="no model has the token 'zzz no such token'"):
        fusekit.plan(recipe)


@pytest.mark.parametrize(("last", "count"), [(A, 0), (B, 1)])
def test_ends_with_different_tokenizers_are_pointed_out(last: str, count: int) -> None:
    slices = [{"sources": [{"model": m, "layer_range": [0, 1]}]} for m in (A, last)]
    plan = fusekit.plan({"merge_method": "passthrough", "slices": slices})
    plan.close()
    assert sum("whose tokenizers differ" in warning for warning in plan.warnings) == count


# -- chat templates -------------------------------------------------------------------------------


def template_of(out: Path) -> str:
    path = out / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    found: str = json.loads((out / "tokenizer_config.json").read_text())["chat_template"]
    return found


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates_are_written_and_render(tmp_path: Path, name: str) -> None:
    import jinja2

    merge(tmp_path, tokenizer_source="base", chat_template=name)
    template = jinja2.Environment(autoescape=False).from_string(template_of(tmp_path / "out"))
    messages = [
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "General"},
    ]
    text = template.render(
        messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=True
    )
    assert text.index("Hello there") < text.index("General")


def test_chatml_marks_every_turn() -> None:
    import jinja2

    text = (
        jinja2.Environment(autoescape=False)
        .from_string(BUILT_IN["chatml"])
        .render(messages=[{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    )
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_auto_takes_the_most_frequent_template_of_the_inputs(tmp_path: Path) -> None:
    models = []
    for name, template in {"a": "{{ 'one' }}", "b": "{{ 'two' }}", "c": "{{ 'two' }}"}.items():
        shutil.copytree(A, tmp_path / name)
        path = tmp_path / name / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        path.write_text(json.dumps({**settings, "chat_template": template}))
        models.append({"model": str(tmp_path / name)})
    merge(tmp_path, models=models, chat_template="auto")
    assert template_of(tmp_path / "out") == "{{ 'two' }}"


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    own = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    merge(tmp_path, tokenizer_source="base", chat_template=own)
    assert template_of(tmp_path / "out") == own


@pytest.mark.parametrize("setting", ["chatm", "{short}", "a text that is long but no template"])
def test_templates_that_are_none_are_refused(setting: str) -> None:
    with pytest.raises(RecipeError, match="chat_template: found"):
        with_template(setting)


def with_template(setting: str) -> None:
    load_recipe({"merge_method": "linear", "models": [{"model": "a"}], "chat_template": setting})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for message in messages %}\n{{ message['content' }}\n{% endfor %}", "line 2 .*'}'"),
        ("{% for message in messages %}\n{{ message }}\n\n", "line 2 .*end of template"),
        ("\n\n{{ messages | no_such_filter }}\n", "line 3 .*'no_such_filter'"),
        ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "nested too deeply"),
    ],
    ids=["expression", "unclosed", "filter", "nesting"],
)
def test_templates_that_jinja_does_not_read_are_refused(template: str, message: str) -> None:
    with pytest.raises(RecipeError, match=f"chat_template: {message}") as caught:
        with_template(template)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_text_of_a_built_in_template_is_a_template(name: str) -> None:
    with_template(BUILT_IN[name])


def test_templates_may_use_what_transformers_adds_to_jinja() -> None:
    with_template(
        "{% for message in messages %}{% if loop.index > 9 %}{% break %}{% endif %}"
        "{% generation %}{{ message | tojson }}{% endgeneration %}{% endfor %}"
        "{{ raise_exception('no') if not messages }}{{ strftime_now('%Y') }}"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", b"[", "tokenizer_config.json: not valid JSON"),
        ("tokenizer_config.json", b"[1]", "tokenizer_config.json: expected a JSON object"),
        ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja: not UTF-8 text"),
    ],
)
def test_files_that_hold_no_template_are_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    shutil.copytree(A, tmp_path / "a")
    (tmp_path / "a" / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        fusekit.plan(
            {
                "merge_method": "linear",
                "models": [{"model": str(tmp_path / "a")}],
                "parameters": {"weight": 1},
                "chat_template": "auto",
            }
        )
