import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from fusekit.errors import CheckpointError, RecipeError
from fusekit.tokenizers.config import config_vocab_size, remapped_config, with_vocab_size
from fusekit.tokenizers.union import (
    ModelRow,
    TokenizerSpec,
    TokenOverride,
    VocabularyInput,
    ZeroRow,
    merge_vocabularies,
    tokenizer_spec,
)
from fusekit.tokenizers.vocabulary import AddedToken, Vocabulary, read_vocabulary
from tests.tokenizers.support import (
    VECTORS,
    aligned_matrices,
    bpe_document,
    inputs_of,
    vocabulary,
)


def _matrices(vocabularies, width=3, padding=0):
    generator = np.random.default_rng(0)
    return {
        name: generator.standard_normal((vocab.size + padding, width)).astype(np.float32)
        for name, vocab in vocabularies.items()
    }


def _override(source, force=False):
    return TokenizerSpec("union", {"x": TokenOverride(source, force)})


# --- golden vectors


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_matches_the_reference_vectors(case):
    with safe_open(VECTORS / "tokenizer-merge.safetensors", "np") as file:
        expected = json.loads(file.metadata()[case])
        vocabularies = {
            name: vocabulary(ids, [t for t in ids if t.startswith("<")])
            for name, ids in expected["vocabs"].items()
        }
        matrices = {name: file.get_tensor(f"{case}/in/{name}/embed") for name in vocabularies}
        wanted = {name: file.get_tensor(f"{case}/out/{name}/permuted") for name in vocabularies}
    merged, aligned = aligned_matrices(vocabularies, matrices, base=expected["base_model"])
    assert merged.ids == expected["out_vocab"]
    for name, matrix in wanted.items():
        np.testing.assert_allclose(aligned[name], matrix, atol=1e-7, rtol=0)


# --- ids


def test_union_keeps_base_ids_and_appends_by_model_then_kind_then_donor_id():
    vocabularies = {
        "A": vocabulary(["<s>", "a", "b"], ["<s>"]),
        "B": vocabulary({"<tool>": 0, "z": 3, "b": 2, "y": 1}, ["<tool>"]),
        "C": vocabulary(["y", "c", "<end>"], ["<end>"]),
    }
    merged, _ = aligned_matrices(vocabularies, _matrices(vocabularies), base="A")
    order = sorted(merged.ids, key=lambda token: merged.ids[token])
    assert order == ["<s>", "a", "b", "y", "z", "<tool>", "c", "<end>"]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=8, unique=True),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
def test_rows_of_a_models_own_tokens_are_kept_whatever_the_others_bring(tokens, with_base):
    vocabularies = {f"m{i}": vocabulary(entry) for i, entry in enumerate(tokens)}
    matrices = _matrices(vocabularies)
    merged, aligned = aligned_matrices(vocabularies, matrices, base="m0" if with_base else None)
    assert sorted(merged.ids.values()) == list(range(len(merged.ids)))
    for name, vocab in vocabularies.items():
        for token, number in vocab.ids.items():
            assert (aligned[name][merged.ids[token]] == matrices[name][number]).all()
    assert all(matrix.shape == (len(merged.ids), 3) for matrix in aligned.values())


@settings(max_examples=20, deadline=None)
@given(st.permutations(["m1", "m2", "m3"]))
def test_the_order_of_models_only_changes_new_ids(order):
    vocabularies = {
        "m0": vocabulary(["a", "b"]),
        "m1": vocabulary(["b", "c", "d"]),
        "m2": vocabulary(["d", "e"]),
        "m3": vocabulary(["a", "e", "f"]),
    }
    matrices = _matrices(vocabularies)
    plain, expected = aligned_matrices(vocabularies, matrices)
    shuffled = {name: vocabularies[name] for name in ["m0", *order]}
    merged, aligned = aligned_matrices(shuffled, {name: matrices[name] for name in shuffled})
    assert merged.ids.keys() == plain.ids.keys()
    assert all(merged.ids[token] == plain.ids[token] for token in "ab")
    tokens = sorted(plain.ids)
    for name in vocabularies:
        np.testing.assert_allclose(
            aligned[name][[merged.ids[t] for t in tokens]],
            expected[name][[plain.ids[t] for t in tokens]],
            atol=1e-6,
        )


def test_union_with_itself_is_the_identity_even_with_padding():
    vocabularies = dict.fromkeys(["A", "B"], vocabulary(["a", "b", "c"]))
    matrices = _matrices(vocabularies, padding=5)
    merged, aligned = aligned_matrices(vocabularies, matrices, base="A")
    for name in "AB":
        np.testing.assert_array_equal(aligned[name], matrices[name])
    assert merged.alignment.is_identity("A", 8)
    assert not merged.alignment.is_identity("A", 9)


# --- sources of missing rows


def test_missing_rows_come_from_the_only_owner_then_the_base_then_the_mean():
    vocabularies = {
        "A": vocabulary(["base", "only"]),
        "B": vocabulary(["base", "pair"]),
        "C": vocabulary(["pair", "own"]),
        "D": vocabulary(["own2"]),
    }
    matrices = _matrices(vocabularies)
    merged, aligned = aligned_matrices(vocabularies, matrices, base="A")
    row = {token: aligned["D"][number] for token, number in merged.ids.items()}
    np.testing.assert_array_equal(row["only"], matrices["A"][1])
    np.testing.assert_array_equal(row["base"], matrices["A"][0])
    np.testing.assert_allclose(row["pair"], (matrices["B"][1] + matrices["C"][0]) / 2, atol=1e-7)


def test_a_named_models_tokenizer_is_the_outputs():
    vocabularies = {"A": vocabulary(["a", "b"]), "B": vocabulary(["c", "a", "d"])}
    matrices = _matrices(vocabularies)
    merged, aligned = aligned_matrices(vocabularies, matrices, TokenizerSpec("B"), base="A")
    assert merged.ids == {"c": 0, "a": 1, "d": 2}
    assert merged.origin == "B"
    np.testing.assert_array_equal(aligned["B"], matrices["B"])
    np.testing.assert_array_equal(aligned["A"][1], matrices["A"][0])
    np.testing.assert_array_equal(aligned["A"][0], matrices["B"][0])


@pytest.mark.parametrize("force", [False, True])
def test_override_with_another_token_applies_everywhere_only_when_forced(force):
    vocabularies = {"A": vocabulary(["a", "b"]), "B": vocabulary(["x", "a"])}
    matrices = _matrices(vocabularies)
    spec = _override(ModelRow("A", token="b"), force)
    merged, aligned = aligned_matrices(vocabularies, matrices, spec, base="A")
    wanted = matrices["A"][1]
    np.testing.assert_array_equal(aligned["A"][merged.ids["x"]], wanted)
    own = wanted if force else matrices["B"][0]
    np.testing.assert_array_equal(aligned["B"][merged.ids["x"]], own)


def test_overrides_by_id_by_model_and_by_zero():
    vocabularies = {"A": vocabulary(["a"]), "B": vocabulary(["x"]), "C": vocabulary(["x", "c"])}
    matrices = _matrices(vocabularies)
    for source, wanted in (
        (ModelRow("C", token_id=1), matrices["C"][1]),
        (ModelRow("C"), matrices["C"][0]),
        (ZeroRow(), np.zeros(3, np.float32)),
    ):
        merged, aligned = aligned_matrices(vocabularies, matrices, _override(source))
        np.testing.assert_array_equal(aligned["A"][merged.ids["x"]], wanted)
        np.testing.assert_array_equal(aligned["B"][merged.ids["x"]], matrices["B"][0])


def test_a_token_nobody_has_can_be_made_from_another():
    vocabularies = {"A": vocabulary(["a", "b"])}
    matrices = _matrices(vocabularies)
    merged, aligned = aligned_matrices(vocabularies, matrices, _override(ModelRow("A", "b")))
    assert merged.ids["x"] == 2
    np.testing.assert_array_equal(aligned["A"][2], matrices["A"][1])


# --- rows: holes, padding


def test_padding_to_a_multiple_is_the_mean_of_the_matrix():
    vocabularies = {"A": vocabulary(["a", "b", "c"]), "B": vocabulary(["d"])}
    matrices = _matrices(vocabularies)
    spec = TokenizerSpec(pad_to_multiple_of=8)
    merged, aligned = aligned_matrices(vocabularies, matrices, spec)
    assert (merged.alignment.size, merged.alignment.rows) == (4, 8)
    for matrix in aligned.values():
        np.testing.assert_allclose(matrix[4:], np.tile(matrix[:4].mean(axis=0), (4, 1)), atol=1e-6)


def test_padded_size_of_the_tokenizers_model_is_kept_unless_trimmed():
    vocabularies = {"A": vocabulary(["a", "b"]), "B": vocabulary(["b", "a"])}
    matrices = _matrices(vocabularies, padding=6)
    merged, aligned = aligned_matrices(vocabularies, matrices, base="A")
    assert merged.alignment.rows == 8
    np.testing.assert_array_equal(aligned["A"], matrices["A"])
    np.testing.assert_array_equal(aligned["B"][2:], matrices["B"][2:])
    trimmed, _ = aligned_matrices(vocabularies, matrices, TokenizerSpec(pad_to_multiple_of=1))
    assert trimmed.alignment.rows == 2


def test_holes_in_the_ids_keep_their_rows():
    vocabularies = {"A": vocabulary({"a": 0, "b": 3}), "B": vocabulary(["b", "c"])}
    matrices = _matrices(vocabularies)
    merged, aligned = aligned_matrices(vocabularies, matrices, base="A")
    assert merged.ids == {"a": 0, "b": 3, "c": 4}
    np.testing.assert_array_equal(aligned["A"][:4], matrices["A"])
    np.testing.assert_array_equal(aligned["B"][1:3], matrices["A"][1:3])


def test_tokens_beyond_the_matrix_or_the_stated_size_are_ignored_with_a_note():
    vocab = vocabulary(["a", "b", "late"])
    inputs = [VocabularyInput("A", vocab, 3, vocab_size=2), VocabularyInput("B", vocab, 2)]
    merged = merge_vocabularies(inputs, TokenizerSpec("base"), "A")
    assert merged.ids == {"a": 0, "b": 1}
    assert [note.split(":")[0] for note in merged.notes] == ["A", "B"]
    assert "1 tokens have ids beyond its 2 embedding rows" in merged.notes[0]
    assert "'late'" in merged.notes[0]


def test_a_model_without_tokenizer_uses_the_bases_only_with_as_many_rows():
    base = VocabularyInput("A", vocabulary(["a", "b"]), 4)
    merged = merge_vocabularies([base, VocabularyInput("B", None, 4)], TokenizerSpec(), "A")
    np.testing.assert_array_equal(merged.alignment.own[1], [0, 1, 2, 3])
    assert merged.notes == ("B: no tokenizer found, that of A is assumed",)
    with pytest.raises(
        CheckpointError, match="B: no tokenizer found, and its embedding has 5 rows"
    ):
        merge_vocabularies([base, VocabularyInput("B", None, 5)], TokenizerSpec(), "A")


def test_the_first_definition_of_an_added_token_wins_with_a_note():
    ids = {"<t>": 0}
    first = Vocabulary("A", {"a": 0}, {})
    second = Vocabulary("B", ids, {"<t>": AddedToken("<t>", 0, special=True)})
    third = Vocabulary("C", ids, {"<t>": AddedToken("<t>", 0, special=True, lstrip=True)})
    inputs = [VocabularyInput(v.label, v, 1) for v in (first, second, third)]
    merged = merge_vocabularies(inputs, TokenizerSpec())
    assert len(merged.notes) == 1
    assert "C: 1 added tokens have other flags" in merged.notes[0]


def test_a_large_vocabulary_is_aligned_without_a_row_loop():
    tokens = [f"t{i}" for i in range(150_000)]
    vocabularies = {"A": vocabulary(tokens), "B": vocabulary(tokens[::-1][:120_000])}
    inputs = [VocabularyInput(name, vocab, vocab.size) for name, vocab in vocabularies.items()]
    merged = merge_vocabularies(inputs, TokenizerSpec(), "A")
    np.testing.assert_array_equal(merged.alignment.own[0], np.arange(150_000))
    assert (merged.alignment.own[1] < 0).sum() == 30_000
    assert len(merged.alignment.fallback_row) == 150_000


# --- what is written


def _folder(path, document, **files):
    path.mkdir()
    (path / "tokenizer.json").write_text(json.dumps(document))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return read_vocabulary(path)


def _loaded(files):
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())


def test_the_written_tokenizer_loads_with_the_same_ids_and_flags():
    inputs = VECTORS / "mergekit_e2e" / "inputs"
    models = [("a", 141), ("b", 157)]
    entries = [VocabularyInput(n, read_vocabulary(inputs / f"tok_{n}"), rows) for n, rows in models]
    merged = merge_vocabularies(entries, TokenizerSpec(), "a")
    loaded = _loaded(merged.files)
    assert loaded.get_vocab(with_added_tokens=True) == merged.ids
    assert loaded.encode("the model<|im_end|>").tokens[-1] == "<|im_end|>"
    assert loaded.decode([merged.ids["<|im_end|>"]], skip_special_tokens=True) == ""
    before = _loaded({"tokenizer.json": (inputs / "tok_a" / "tokenizer.json").read_bytes()})
    text = "quick brown fox"
    assert loaded.encode(text).ids == before.encode(text).ids


def test_files_are_copied_byte_for_byte_when_nothing_changes(tmp_path):
    vocab = _folder(tmp_path / "a", bpe_document(["a", "b"]), tokenizer_config={"x": 1})
    merged = merge_vocabularies([VocabularyInput("A", vocab, 2)], TokenizerSpec())
    assert merged.files == {
        name: (tmp_path / "a" / name).read_bytes()
        for name in ("tokenizer.json", "tokenizer_config.json")
    }


def test_dropped_tokens_take_the_merges_that_need_them_along(tmp_path):
    document = bpe_document(
        ["a", "b", "c", "ab", "abc", "bc"], [("a", "b"), ("ab", "c"), ("b", "c")]
    )
    vocab = _folder(tmp_path / "a", document)
    merged = merge_vocabularies([VocabularyInput("A", vocab, 5)], TokenizerSpec())
    written = json.loads(merged.files["tokenizer.json"])
    assert "bc" not in written["model"]["vocab"]
    assert written["model"]["merges"] == [["a", "b"], ["ab", "c"]]
    assert _loaded(merged.files).get_vocab() == merged.ids


def test_ids_with_holes_survive_loading(tmp_path):
    document = bpe_document(["a", "b"])
    document["model"]["vocab"]["b"] = 5
    first = _folder(tmp_path / "a", document)
    second = _folder(tmp_path / "b", bpe_document(["a", "c", "<t>"], special=["<t>"]))
    entries = [VocabularyInput("A", first, 6), VocabularyInput("B", second, 3)]
    merged = merge_vocabularies(entries, TokenizerSpec())
    assert merged.ids == {"a": 0, "b": 5, "c": 6, "<t>": 7}
    assert _loaded(merged.files).get_vocab(with_added_tokens=True) == merged.ids


def test_unigram_unions_load_with_the_same_ids(tmp_path):
    pieces = [["<unk>", 0.0], ["▁a", -1.0], ["b", -2.0]]
    unigram = {"version": "1.0", "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces}}
    first = _folder(tmp_path / "a", unigram)
    second = _folder(tmp_path / "b", bpe_document(["b", "▁new", "<t>"], special=["<t>"]))
    entries = [VocabularyInput("A", first, 3), VocabularyInput("B", second, 3)]
    merged = merge_vocabularies(entries, TokenizerSpec())
    assert _loaded(merged.files).get_vocab(with_added_tokens=True) == merged.ids
    assert merged.ids["▁new"] == 3


def test_added_tokens_decoder_follows_the_union(tmp_path):
    decoder = {"0": {"content": "<s>", "special": True}}
    first = _folder(
        tmp_path / "a",
        bpe_document(["<s>", "a"], special=["<s>"]),
        tokenizer_config={"added_tokens_decoder": decoder, "bos_token": "<s>"},
    )
    second = _folder(tmp_path / "b", bpe_document(["<t>"], special=["<t>"]))
    entries = [VocabularyInput("A", first, 2), VocabularyInput("B", second, 1)]
    merged = merge_vocabularies(entries, TokenizerSpec())
    written = json.loads(merged.files["tokenizer_config.json"])
    assert written["bos_token"] == "<s>"
    assert written["added_tokens_decoder"]["2"]["content"] == "<t>"


def test_a_named_token_is_taken_over_as_its_model_defines_it(tmp_path):
    first = _folder(tmp_path / "a", bpe_document(["a"]))
    second = _folder(tmp_path / "b", bpe_document(["a", "b", "<t>"], special=["<t>"]))
    entries = [VocabularyInput("A", first, 1), VocabularyInput("B", second, 3)]
    spec = TokenizerSpec("base", {"<t>": TokenOverride()})
    merged = merge_vocabularies(entries, spec, "A")
    assert merged.ids == {"a": 0, "<t>": 1}
    (entry,) = json.loads(merged.files["tokenizer.json"])["added_tokens"]
    assert entry == AddedToken("<t>", 1, special=True).to_json()


@pytest.mark.torch
def test_a_slow_tokenizers_union_loads_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "a"
    folder.mkdir()
    ids = {token: index for index, token in enumerate(["<|endoftext|>", "a", "b", "Ġ", "ab"])}
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    other = _folder(tmp_path / "b", bpe_document(["a", "<im>"], special=["<im>"]))
    entries = [
        VocabularyInput("A", read_vocabulary(folder), 5),
        VocabularyInput("B", other, 2),
    ]
    merged = merge_vocabularies(entries, TokenizerSpec())
    out = tmp_path / "out"
    out.mkdir()
    for name, content in merged.files.items():
        (out / name).write_bytes(content)
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    assert loaded.get_vocab() == merged.ids
    assert loaded("ab<im>a")["input_ids"] == [4, 5, 1]
    assert read_vocabulary(out).ids == merged.ids


# --- settings


def test_parses_the_whole_dialect():
    spec = tokenizer_spec(
        {
            "source": {"model": {"path": "org/m", "revision": "v1"}, "lora": "org/l"},
            "pad_to_multiple_of": 64,
            "tokens": {
                "<a>": {"source": "m"},
                "<b>": {"source": {"kind": "zero"}, "force": True},
                "<c>": {"source": {"kind": "model_token", "model": "m", "token": "</s>"}},
                "<d>": {"source": {"kind": "model_token", "model": "m", "token_id": 7}},
                "<e>": {"source": {"path": "m", "revision": "r"}},
                "<f>": {},
            },
        }
    )
    assert spec == TokenizerSpec(
        "org/m@v1+org/l",
        {
            "<a>": TokenOverride(ModelRow("m")),
            "<b>": TokenOverride(ZeroRow(), force=True),
            "<c>": TokenOverride(ModelRow("m", token="</s>")),
            "<d>": TokenOverride(ModelRow("m", token_id=7)),
            "<e>": TokenOverride(ModelRow("m@r")),
            "<f>": TokenOverride(),
        },
        64,
    )
    assert tokenizer_spec("base") == TokenizerSpec("base")
    assert tokenizer_spec({}) == TokenizerSpec("union")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"sorce": "union"}, r"unknown key 'sorce' \(did you mean 'source'\?\)"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of: expected a positive integer, found 0"),
        ({"pad_to_multiple_of": True}, "expected a positive integer, found True"),
        ({"tokens": ["<a>"]}, "tokenizer.tokens: expected a mapping"),
        ({"tokens": {"<a>": "m"}}, r"tokens\['<a>'\]: expected a mapping with 'source'"),
        ({"tokens": {"<a>": {"source": "m", "froce": 1}}}, "did you mean 'force'"),
        ({"tokens": {"<a>": {"source": "m", "force": 1}}}, "force: expected true or false"),
        ({"tokens": {"<a>": {"force": True}}}, "force needs a source"),
        ({"tokens": {"<a>": {"source": {"kind": "zreo"}}}}, "did you mean 'zero'"),
        ({"tokens": {"<a>": {"source": {"kind": "model_token", "model": "m"}}}}, "either token or"),
        ({"tokens": {"<a>": {"source": {"kind": "model_token", "token": "x"}}}}, "needs a model"),
        (
            {"tokens": {"<a>": {"source": {"model": "m", "token_id": -1, "kind": "model_token"}}}},
            "expected a row number, found -1",
        ),
        ({"source": 3}, "tokenizer.source: expected a model reference, found 3"),
    ],
)
def test_wrong_settings_are_refused(value, message):
    with pytest.raises(RecipeError, match=message):
        tokenizer_spec(value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (ModelRow("moodel"), r"model 'moodel' is not in the recipe \(did you mean 'model'\?\)"),
        (ModelRow("model", token="allpha"), r"model has no token 'allpha' \(did you mean 'alpha'"),
        (ModelRow("model", token_id=9), "token_id 9 is beyond the 2 embedding rows of model"),
        (ModelRow("model"), r"no model has the token 'x'; a new token needs a source"),
        (None, "no model has the token 'x'"),
    ],
)
def test_overrides_that_lead_nowhere_are_refused(source, message):
    vocabularies = {"model": vocabulary(["alpha", "b"])}
    with pytest.raises(RecipeError, match=message):
        merge_vocabularies(
            inputs_of(vocabularies, _matrices(vocabularies)), _override(source), None
        )


def test_unknown_sources_and_bases_are_refused():
    entries = [VocabularyInput("model", vocabulary(["a"]), 1)]
    with pytest.raises(RecipeError, match=r"'unoin' is not 'union', .* \(did you mean 'union'\?\)"):
        merge_vocabularies(entries, TokenizerSpec("unoin"))
    with pytest.raises(RecipeError, match="base_model 'other' is not among the models"):
        merge_vocabularies(entries, TokenizerSpec(), "other")
    with pytest.raises(RecipeError, match="no models"):
        merge_vocabularies([], TokenizerSpec())


# --- configs


def test_token_ids_of_configs_move_to_the_output_vocabulary():
    vocabularies = {"A": vocabulary(["a", "<s>"]), "B": vocabulary(["<s>", "a", "<t>"])}
    merged, _ = aligned_matrices(vocabularies, _matrices(vocabularies), base="A")
    new_ids = merged.alignment.new_ids("B", 3)
    np.testing.assert_array_equal(new_ids, [1, 0, 2])
    config = {"bos_token_id": 0, "eos_token_id": [1, 2], "text_config": {"pad_token_id": 1}, "n": 0}
    assert remapped_config(config, new_ids) == {
        "bos_token_id": 1,
        "eos_token_id": [0, 2],
        "text_config": {"pad_token_id": 0},
        "n": 0,
    }
    assert remapped_config({"bos_token_id": 1}, np.array([0, -1])) == {"bos_token_id": None}


def test_token_ids_stay_those_of_tokens_with_forced_rows():
    vocabularies = {"A": vocabulary(["a", "<s>"]), "B": vocabulary(["<s>", "a", "<t>"])}
    spec = TokenizerSpec(tokens={"<s>": TokenOverride(ModelRow("B", "<t>"), force=True)})
    merged, _ = aligned_matrices(vocabularies, _matrices(vocabularies), spec, base="A")
    np.testing.assert_array_equal(merged.alignment.new_ids("A", 2), [0, 1])
    np.testing.assert_array_equal(merged.alignment.new_ids("B", 3), [1, 0, 2])


def test_vocab_size_is_found_and_changed_where_it_stands():
    assert config_vocab_size({"text_config": {"vocab_size": 7}}) == 7
    assert config_vocab_size(None) is None
    assert with_vocab_size({"vocab_size": 5}, 8) == {"vocab_size": 8}
    nested = {"text_config": {"vocab_size": 7, "h": 1}, "vision_config": {"vocab_size": 3}}
    assert with_vocab_size(nested, 8) == {
        "text_config": {"vocab_size": 8, "h": 1},
        "vision_config": {"vocab_size": 3},
    }
