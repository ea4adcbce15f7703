import json

import numpy as np
import pytest

from fusekit.errors import FusekitError
from fusekit.tokenizers.matching import (
    byte_alphabet,
    byte_matches,
    digit_tokens,
    match_tokens,
    meaning,
    meanings,
    pieces,
    prefix_matches,
)
from fusekit.tokenizers.vocabulary import AddedToken, Vocabulary, read_vocabulary
from tests.tokenizers.support import VECTORS, bpe_document


def _vocabulary(tokens, alphabet="metaspace", special=(), roles=None):
    ids = {token: index for index, token in enumerate(tokens)}
    added = {token: AddedToken(token, ids[token], special=True) for token in special}
    return Vocabulary("memory", ids, added, roles or {}, alphabet)


def _pairs(matched):
    return list(zip(matched.shared_donor.tolist(), matched.shared_model.tolist(), strict=True))


def test_the_byte_alphabet_is_that_of_gpt2():
    table = byte_alphabet()
    assert sorted(table) == list(range(256)) and len(set(table.values())) == 256
    assert table[ord(" ")] == "Ġ" and table[ord("\n")] == "Ċ" and table[ord("a")] == "a"
    assert "".join(table[byte] for byte in "é".encode()) == "Ã©"


@pytest.mark.parametrize(
    ("alphabet", "token", "wanted"),
    [
        ("byte-level", "Ġthe", b" the"),
        ("byte-level", "Ã©", "é".encode()),
        ("metaspace", "▁the", b" the"),
        ("metaspace", "é", "é".encode()),
        ("metaspace", "<0x0A>", 10),
        ("byte-level", "<0x0A>", b"<0x0A>"),
        ("wordpiece", "the", b" the"),
        ("wordpiece", "##ing", b"ing"),
        ("plain", "the", b"the"),
    ],
)
def test_tokens_mean_their_text_in_every_alphabet(alphabet, token, wanted):
    assert meaning(_vocabulary([token], alphabet), token) == wanted


def test_tokens_match_across_alphabets_by_text_and_role_in_donor_order():
    model = _vocabulary(
        ["▁the", "é", "<s>", "</s>", "ing"], special=["<s>", "</s>"], roles={"eos_token": "</s>"}
    )
    donor = _vocabulary(
        ["<|end|>", "Ġthe", "Ã©", "Ġnew", "ing"],
        "byte-level",
        special=["<|end|>"],
        roles={"eos_token": "<|end|>", "pad_token": "<|end|>"},
    )
    matched = match_tokens(model, donor, 5, 5)
    assert _pairs(matched) == [(0, 3), (1, 0), (2, 1), (4, 4)]
    assert matched.missing.tolist() == [3]
    assert matched.meanings == (b" new",)


def test_the_same_text_wins_over_the_same_role():
    model = _vocabulary(["</s>", "<e>"], special=["</s>", "<e>"], roles={"eos_token": "<e>"})
    donor = _vocabulary(["</s>"], special=["</s>"], roles={"eos_token": "</s>"})
    assert _pairs(match_tokens(model, donor, 2, 1)) == [(0, 0)]


def test_ids_beyond_either_matrix_are_ignored():
    both = _vocabulary(["a", "b", "c"])
    matched = match_tokens(both, both, 2, 3)
    assert _pairs(matched) == [(0, 0), (1, 1)]
    assert matched.missing.tolist() == [2]
    assert match_tokens(both, both, 3, 2).missing.tolist() == []


def test_single_bytes_match_their_hexadecimal_tokens_both_ways():
    known = meanings(_vocabulary(["<0x0A>", "b"]), 2)
    assert byte_matches((b"\n", ord("b"), b"ab", 7), known).tolist() == [0, 1, -1, -1]


def test_the_longest_proper_prefix_matches():
    known = meanings(_vocabulary(["▁un", "▁", "u"]), 3)
    missing = (b" under", b" u", b"x", 9)
    assert prefix_matches(missing, known).tolist() == [0, 1, -1, -1]
    assert prefix_matches((b" un",), known).tolist() == [1]


def test_digits_shared_are_counted():
    model, donor = _vocabulary(["1", "▁2", "a"]), _vocabulary(["1", "12", "▁2", "123"])
    matched = match_tokens(model, donor, 3, 4)
    assert digit_tokens(matched, donor) == (4, 2)


def test_pieces_follow_the_models_own_merges():
    pytest.importorskip("tokenizers")
    model = read_vocabulary(VECTORS / "mergekit_e2e" / "inputs" / "tok_a")
    found = pieces((b" model", b"model", b" modell", "ß".encode()), model, 141)
    names = {number: token for token, number in model.ids.items()}
    assert [[names[number] for number in entry] for entry in found] == [
        ["▁model"],
        ["m", "odel"],
        ["▁model", "l"],
        [],
    ]
    assert pieces((b" model",), model, 60) == [[]]


def test_bytes_that_are_no_text_use_byte_tokens(tmp_path):
    pytest.importorskip("tokenizers")
    tokens = ["a", "<0xC3>", "<0xA9>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(bpe_document(tokens)))
    model = read_vocabulary(tmp_path)
    assert pieces((b"\xc3", 0xA9, b"\xff"), model, 3) == [[1], [2], []]


def test_splitting_needs_tokenizer_files():
    pytest.importorskip("tokenizers")
    with pytest.raises(FusekitError, match="memory: no tokenizer files"):
        pieces((b"a",), _vocabulary(["a"]), 1)


def test_a_large_donor_is_matched_completely():
    tokens = [f"▁t{i}" for i in range(100_000)]
    matched = match_tokens(_vocabulary(tokens[::2]), _vocabulary(tokens), 50_000, 100_000)
    np.testing.assert_array_equal(matched.shared_donor, np.arange(0, 100_000, 2))
    np.testing.assert_array_equal(matched.shared_model, np.arange(50_000))
