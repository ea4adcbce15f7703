import json
import threading

import ml_dtypes
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fusekit.checkpoint.dtypes import DTYPES
from fusekit.checkpoint.memory import MemorySource
from fusekit.checkpoint.safetensors import SafetensorsFile
from fusekit.checkpoint.source import TensorInfo
from fusekit.errors import CheckpointError
from fusekit.tokenizers.config import config_vocab_size
from fusekit.tokenizers.embedding import (
    AlignedSource,
    align_sources,
    embedding_rows,
    vocabulary_tensors,
)
from fusekit.tokenizers.union import (
    TokenizerSpec,
    VocabularyInput,
    merge_vocabularies,
    tokenizer_spec,
)
from fusekit.tokenizers.vocabulary import read_json, read_vocabulary
from tests.tokenizers.support import EMBED, VECTORS, CountingSource, read_tensor, vocabulary

HEAD = "lm_head.weight"
E2E = VECTORS / "mergekit_e2e"


def _infos(**shapes):
    return {
        name.replace("__", "."): TensorInfo(name.replace("__", "."), DTYPES["F32"], shape)
        for name, shape in shapes.items()
    }


def _aligned(states, vocabularies, spec=None, base=None):
    """Sources, merged vocabulary and the aligned view of every model."""
    merged = merge_vocabularies(
        [
            VocabularyInput(name, vocabularies[name], len(states[name][EMBED]))
            for name in vocabularies
        ],
        spec or TokenizerSpec(),
        base,
    )
    sources = {
        name: CountingSource(MemorySource(state, label=name)) for name, state in states.items()
    }
    tensors = {
        name: vocabulary_tensors(
            source.tensors, tokens=vocabularies[name].size, vocab_size=len(states[name][EMBED])
        )
        for name, source in sources.items()
    }
    return sources, merged, align_sources(sources, tensors, merged.alignment)


def _random(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# --- the whole-checkpoint example


def test_reproduces_the_union_example_after_task_arithmetic():
    case = E2E / "p1_tokenizer_union_public"
    recipe = yaml.safe_load((case / "config.yml").read_text())
    references = [recipe["models"][0]["model"], recipe["base_model"]]
    base = recipe["base_model"]
    sources, tensors, inputs = {}, {}, []
    for reference in references:
        folder = case / reference
        vocab = read_vocabulary(folder)
        size = config_vocab_size(read_json(folder / "config.json"))
        sources[reference] = SafetensorsFile(folder / "model.safetensors")
        tensors[reference] = vocabulary_tensors(
            sources[reference].tensors, tokens=vocab.size, vocab_size=size
        )
        rows = embedding_rows(tensors[reference], reference)
        inputs.append(VocabularyInput(reference, vocab, rows, size))
    merged = merge_vocabularies(inputs, tokenizer_spec(recipe["tokenizer"]), base)
    aligned = align_sources(sources, tensors, merged.alignment)

    expected_ids = json.loads((case / "expected_vocab.json").read_text())
    assert merged.ids.keys() == expected_ids.keys()
    assert (
        merged.alignment.rows
        == json.loads((case / "expected_config.json").read_text())["vocab_size"]
    )
    order = sorted(expected_ids)
    wanted_rows = [expected_ids[token] for token in order]
    our_rows = [merged.ids[token] for token in order]
    expected = load_file(case / "expected.safetensors")
    for name in (EMBED, HEAD):
        ours = {reference: read_tensor(aligned[reference], name) for reference in references}
        result = ours[base] + 0.5 * (ours[references[0]] - ours[base])
        np.testing.assert_allclose(result[our_rows], expected[name][wanted_rows], atol=2e-6)
        np.testing.assert_allclose(result[241:], expected[name][241:], atol=2e-6)
        assert result.shape == expected[name].shape == (248, 64)


def test_logits_of_own_tokens_survive_alignment():
    vocabularies = {"A": vocabulary(["a", "b", "c"]), "B": vocabulary(["c", "d", "a"])}
    states = {
        name: {EMBED: _random((3, 4), seed=seed), HEAD: _random((3, 4), seed=seed + 5)}
        for seed, name in enumerate(vocabularies)
    }
    _, merged, aligned = _aligned(states, vocabularies)
    text = ["c", "a", "c"]
    for name, vocab in vocabularies.items():
        hidden = np.tanh(states[name][EMBED][[vocab.ids[t] for t in text]])
        before = hidden @ states[name][HEAD].T
        new_hidden = np.tanh(read_tensor(aligned[name], EMBED)[[merged.ids[t] for t in text]])
        after = new_hidden @ read_tensor(aligned[name], HEAD).T
        own = [merged.ids[token] for token in vocab.ids]
        np.testing.assert_array_equal(after[:, own], before[:, list(vocab.ids.values())])


# --- reading


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_range_equals_that_part_of_the_whole(data):
    vocabularies = {
        "A": vocabulary(["a", "b", "c", "d"]),
        "B": vocabulary(["d", "x", "a", "y"]),
        "C": vocabulary(["y", "x", "z"]),
    }
    states = {name: {EMBED: _random((v.size, 5))} for name, v in vocabularies.items()}
    _, _, aligned = _aligned(states, vocabularies, TokenizerSpec(pad_to_multiple_of=4))
    source = aligned[data.draw(st.sampled_from("ABC"))]
    whole = read_tensor(source, EMBED).reshape(-1)
    start = data.draw(st.integers(0, whole.size))
    stop = data.draw(st.integers(start, whole.size))
    part = np.empty(stop - start, np.float32)
    source.read_into(EMBED, start, stop, memoryview(part.view(np.uint8)))
    np.testing.assert_array_equal(part, whole[start:stop])


def test_contiguous_rows_are_one_read_and_nothing_else_is_touched():
    tokens = [f"t{i}" for i in range(1000)]
    vocabularies = {"A": vocabulary(tokens), "B": vocabulary(["new", *tokens])}
    width = 8192
    states = {
        name: {EMBED: np.zeros((v.size, width), np.float32)} for name, v in vocabularies.items()
    }
    sources, _, aligned = _aligned(states, vocabularies, base="A")
    buffer = np.empty(100 * width, np.float32)
    aligned["B"].read_into(EMBED, 200 * width, 300 * width, memoryview(buffer.view(np.uint8)))
    assert sources["B"].reads == [(EMBED, 201 * width, 301 * width)]
    assert sources["A"].reads == []


def test_reads_stay_few_when_rows_are_scattered_over_narrow_tensors():
    generator = np.random.default_rng(0)
    count = 20_000
    tokens = [f"t{i}" for i in range(count)]
    shuffled = [tokens[i] for i in generator.permutation(count)]
    vocabularies = {"A": vocabulary(tokens), "B": vocabulary(shuffled)}
    states = {
        name: {EMBED: _random((count, 2)), "lm_head.bias": _random((count,))}
        for name in vocabularies
    }
    sources, merged, aligned = _aligned(states, vocabularies, base="A")
    bias = read_tensor(aligned["B"], "lm_head.bias")
    own = [vocabularies["B"].ids[token] for token in tokens]
    np.testing.assert_array_equal(bias, states["B"]["lm_head.bias"][own])
    assert len(sources["B"].reads) == 1
    assert merged.alignment.is_identity("A", count)


def test_scattered_missing_rows_are_read_together_not_one_by_one():
    count, width = 4000, 4
    tokens = [f"t{i}" for i in range(count)]
    vocabularies = {"A": vocabulary(tokens), "B": vocabulary(tokens[::2])}
    states = {name: {EMBED: _random((v.size, width))} for name, v in vocabularies.items()}
    sources, _, aligned = _aligned(states, vocabularies, base="A")
    whole = read_tensor(aligned["B"], EMBED)
    np.testing.assert_array_equal(whole[::2], states["B"][EMBED])
    np.testing.assert_array_equal(whole[1::2], states["A"][EMBED][1::2])
    assert len(sources["A"].reads) + len(sources["B"].reads) == 2


def test_the_padding_row_is_computed_once():
    vocabularies = {"A": vocabulary(["a", "b"]), "B": vocabulary(["b", "c"])}
    states = {name: {EMBED: _random((2, 3))} for name in vocabularies}
    sources, _, aligned = _aligned(states, vocabularies, TokenizerSpec(pad_to_multiple_of=8))
    buffers = [np.empty(3, np.float32) for _ in range(4)]
    threads = [
        threading.Thread(
            target=aligned["B"].read_into,
            args=(EMBED, 9 + 3 * i, 12 + 3 * i, memoryview(buffer.view(np.uint8))),
        )
        for i, buffer in enumerate(buffers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((buffer == buffers[0]).all() for buffer in buffers)
    assert sum(len(source.reads) for source in sources.values()) == 2


def test_mean_rows_are_computed_in_float32_and_rounded_once():
    vocabularies = {"A": vocabulary(["a"]), "B": vocabulary(["x"]), "C": vocabulary(["x"])}
    bf16 = ml_dtypes.bfloat16
    states = {
        "A": {EMBED: _random((1, 64), bf16, 0)},
        "B": {EMBED: _random((1, 64), np.float32, 1)},
        "C": {EMBED: _random((1, 64), bf16, 2)},
    }
    _, _, aligned = _aligned(states, vocabularies)
    mean = (states["B"][EMBED] + states["C"][EMBED].astype(np.float32)) / 2
    row = read_tensor(aligned["A"], EMBED)[1]
    assert row.dtype == bf16
    np.testing.assert_array_equal(row, mean[0].astype(bf16))


def test_other_tensors_pass_through_and_untouched_models_stay_themselves():
    vocabularies = {"A": vocabulary(["a", "b"]), "B": vocabulary(["b", "a"])}
    states = {
        name: {EMBED: _random((2, 3)), "model.norm.weight": _random(3)} for name in vocabularies
    }
    sources, _, aligned = _aligned(states, vocabularies)
    assert aligned["A"] is sources["A"]
    assert isinstance(aligned["B"], AlignedSource)
    assert list(aligned["B"].tensors) == [EMBED, "model.norm.weight"]
    np.testing.assert_array_equal(
        read_tensor(aligned["B"], "model.norm.weight"), states["B"]["model.norm.weight"]
    )
    assert aligned["B"].where(EMBED) == "B"


def test_the_vocabulary_may_be_the_second_axis():
    vocabularies = {"A": vocabulary(list("abcdefg")), "B": vocabulary(list("gfxcba"))}
    states = {name: {EMBED: _random((v.size, 4))} for name, v in vocabularies.items()}
    turned = {
        name: state | {HEAD: np.ascontiguousarray(state[EMBED].T)} for name, state in states.items()
    }
    spec = TokenizerSpec(pad_to_multiple_of=16)
    _, _, aligned = _aligned(turned, vocabularies, spec, base="A")
    for source in aligned.values():
        assert source.tensors[HEAD].shape == (4, 16)
        np.testing.assert_array_equal(read_tensor(source, HEAD).T, read_tensor(source, EMBED))


def test_a_tied_model_lends_its_embedding_to_heads():
    vocabularies = {"A": vocabulary(["a", "b"]), "B": vocabulary(["b", "c"])}
    states = {
        "A": {EMBED: _random((2, 3)), HEAD: _random((2, 3), seed=1)},
        "B": {EMBED: _random((2, 3), seed=2)},
    }
    _, merged, aligned = _aligned(states, vocabularies)
    head = read_tensor(aligned["A"], HEAD)
    np.testing.assert_array_equal(head[merged.ids["c"]], states["B"][EMBED][1])


def test_identity_changes_with_the_row_map():
    plain = {"A": vocabulary(["a", "b"]), "B": vocabulary(["b", "a"])}
    other = {"A": vocabulary(["b", "a"]), "B": vocabulary(["b", "a"])}
    states = {name: {EMBED: _random((2, 3))} for name in plain}
    spec = TokenizerSpec(pad_to_multiple_of=4)
    first, second = (_aligned(states, v, spec)[2]["B"].identity() for v in (plain, other))
    assert first["vocabulary_sha256"] != second["vocabulary_sha256"]
    assert first["vocabulary_rows"] == 4
    assert _aligned(states, plain, spec)[2]["B"].identity() == first


# --- refusals and detection


def test_hidden_sizes_must_agree():
    vocabularies = {"A": vocabulary(["a"]), "B": vocabulary(["b"])}
    states = {"A": {EMBED: _random((1, 3))}, "B": {EMBED: _random((1, 4))}}
    with pytest.raises(
        CheckpointError, match=r"shape \[1, 4\], that of A \[1, 3\].*one hidden size"
    ):
        _aligned(states, vocabularies)


def test_a_lender_without_the_tensor_is_refused():
    vocabularies = {"A": vocabulary(["a"]), "B": vocabulary(["b"])}
    states = {
        "A": {EMBED: _random((1, 3)), "lm_head.bias": _random(1)},
        "B": {EMBED: _random((1, 3))},
    }
    with pytest.raises(CheckpointError, match=r"B: tensor 'lm_head\.bias' of A needs rows"):
        _aligned(states, vocabularies)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("transformer.wte.weight", "embedding"),
        ("gpt_neox.embed_in.weight", "embedding"),
        ("embed_out.weight", "head"),
        ("bert.embeddings.word_embeddings.weight", "embedding"),
        ("cls.predictions.decoder.weight", "head"),
        ("cls.predictions.bias", "head"),
        ("shared.weight", "embedding"),
        ("encoder.embed_tokens.weight", "embedding"),
        ("text_model.embeddings.token_embedding.weight", "embedding"),
        ("backbone.embeddings.weight", "embedding"),
        ("language_model.lm_head.weight", "head"),
        ("model.language_model.embed_tokens.weight", "embedding"),
        ("output.weight", "head"),
        ("tok_embeddings.weight", "embedding"),
        ("model.layers.0.attention.output.weight", None),
        ("vision_tower.embeddings.position_embedding.weight", None),
        ("model.layers.0.mlp.shared.weight", None),
        ("embeddings.position_embeddings.weight", None),
    ],
)
def test_detects_embeddings_and_heads_by_name(name, role):
    shape = (100,) if name.endswith("bias") else (100, 8)
    found = vocabulary_tensors({name: TensorInfo(name, DTYPES["F32"], shape)}, tokens=100)
    assert {tensor.role for tensor in found.values()} == ({role} if role else set())


def test_the_stated_size_decides_the_axis():
    found = vocabulary_tensors(
        _infos(lm_head__weight=(4096, 128), wte__weight=(128, 4096)), tokens=120, vocab_size=128
    )
    assert {name: tensor.axis for name, tensor in found.items()} == {
        "lm_head.weight": 1,
        "wte.weight": 0,
    }
    assert found["lm_head.weight"].rows == 128


def test_a_matrix_may_have_more_rows_than_the_config_says_and_fewer_than_there_are_tokens():
    found = vocabulary_tensors(_infos(lm_head__weight=(9, 4)), tokens=10, vocab_size=8)
    assert (found["lm_head.weight"].axis, found["lm_head.weight"].rows) == (0, 9)


def test_a_side_that_fits_no_vocabulary_is_refused():
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight': shape \[5, 4\].*least 8"):
        vocabulary_tensors(_infos(lm_head__weight=(5, 4)), tokens=8, vocab_size=9)
    with pytest.raises(CheckpointError, match="expected at least 8"):
        vocabulary_tensors(_infos(lm_head__weight=(5, 4)), tokens=8)


def test_a_model_without_embedding_is_refused():
    tensors = vocabulary_tensors(_infos(lm_head__weight=(9, 4)), tokens=8)
    with pytest.raises(CheckpointError, match="m: no token embedding found"):
        embedding_rows(tensors, "m")
