import json

import pytest

from fusekit.errors import CheckpointError
from fusekit.tokenizers.vocabulary import MAX_TOKEN_ID, has_tokenizer, read_vocabulary
from tests.tokenizers.support import VECTORS, bpe_document


def _write(folder, **files):
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def test_reads_a_tokenizer_json_with_roles():
    read = read_vocabulary(VECTORS / "mergekit_e2e" / "inputs" / "tok_b")
    assert read.size == len(read.ids) == 154
    assert read.ids["<|im_end|>"] == 4
    assert read.added["<|im_end|>"].special
    assert read.roles == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
    }
    assert read.alphabet == "metaspace"
    assert "<s>" in read.special and "▁model" not in read.special


def test_agrees_with_the_tokenizers_library():
    tokenizers = pytest.importorskip("tokenizers")
    folder = VECTORS / "mergekit_e2e" / "inputs" / "tok_a"
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert read_vocabulary(folder).ids == library.get_vocab(with_added_tokens=True)


def test_reads_vocab_json_with_merges_and_added_tokens(tmp_path):
    _write(
        tmp_path,
        vocab__json={"a": 0, "Ġa": 1},
        merges__txt="#version: 0.2\nĠ a\n",
        added_tokens__json={"<x>": 2},
        tokenizer_config__json={
            "eos_token": {"content": "<x>"},
            "added_tokens_decoder": {"3": {"content": "<y>", "special": True}},
        },
    )
    read = read_vocabulary(tmp_path)
    assert dict(read.ids) == {"a": 0, "Ġa": 1, "<x>": 2, "<y>": 3}
    assert read.added["<y>"].special and not read.added["<x>"].special
    assert read.roles == {"eos_token": "<x>"}
    assert read.alphabet == "byte-level"


def test_reads_vocab_txt_and_unigram_lists(tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "t5").mkdir()
    _write(tmp_path / "bert", vocab__txt="[PAD]\nrun\n##ning\n")
    bert = read_vocabulary(tmp_path / "bert")
    assert dict(bert.ids) == {"[PAD]": 0, "run": 1, "##ning": 2}
    assert bert.alphabet == "wordpiece"
    unigram = {"model": {"type": "Unigram", "vocab": [["<pad>", 0.0], ["▁a", -1.0]]}}
    _write(tmp_path / "t5", tokenizer__json=unigram)
    assert dict(read_vocabulary(tmp_path / "t5").ids) == {"<pad>": 0, "▁a": 1}


def test_a_folder_without_a_tokenizer_is_refused_with_what_is_missing(tmp_path):
    assert not has_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"no tokenizer found, expected tokenizer\.json"):
        read_vocabulary(tmp_path)


def test_a_lone_sentencepiece_binary_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(CheckpointError, match=r"sentencepiece file 'tokenizer\.model'.*save_pre"):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize("number", [-1, 1.0, True, "3", MAX_TOKEN_ID, None])
def test_ids_that_are_not_small_integers_are_refused(tmp_path, number):
    document = bpe_document(["a", "b"])
    document["model"]["vocab"]["b"] = number
    _write(tmp_path, tokenizer__json=document)
    with pytest.raises(CheckpointError, match="token 'b' has id"):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        ({"model": {}}, "expected a 'model' object with a 'vocab'"),
        ({"model": {"vocab": [["a"], 3]}}, "entry 1 of the vocab is 3"),
        (
            {"model": {"vocab": {}}, "added_tokens": [{"id": 3}]},
            "expected an object with 'content'",
        ),
    ],
)
def test_malformed_tokenizer_files_are_refused(tmp_path, content, message):
    _write(tmp_path, tokenizer__json=content)
    with pytest.raises(CheckpointError, match=message):
        read_vocabulary(tmp_path)
