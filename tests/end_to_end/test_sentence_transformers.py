"""Tiny sentence encoders: saved by sentence-transformers, merged, loaded back by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fusekit
from tests.checkpoint.servers import FileServer, serving

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

pytestmark = pytest.mark.torch

BERT = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
SENTENCES = ["a b", "c d e", "f"]


def transformer(folder: Path, seed: int) -> Any:
    torch.manual_seed(seed)
    transformers.BertModel(transformers.BertConfig(**BERT)).save_pretrained(folder)
    letters = [chr(ord("a") + i) for i in range(26)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizer.from_pretrained(str(folder)).save_pretrained(folder)
    return modules.Transformer(str(folder))


def encoder(folder: Path, seed: int) -> list[Any]:
    """A transformer and a dense layer behind it."""
    return [
        transformer(folder / "bert", seed),
        modules.Pooling(16),
        modules.Dense(16, 6),
        modules.Normalize(),
    ]


def two_towers(folder: Path, seed: int) -> list[Any]:
    """Different transformers for queries and documents."""
    towers = {
        f"{tower}_modules": [transformer(folder / tower, seed + i), modules.Pooling(16)]
        for i, tower in enumerate(("query", "document"))
    }
    return [modules.Router.for_query_document(**towers)]


def token_table(folder: Path, seed: int) -> list[Any]:
    """Embeddings of single tokens, averaged."""
    tokenizer = transformer(folder / "bert", seed).tokenizer.backend_tokenizer
    return [modules.StaticEmbedding(tokenizer, embedding_dim=8)]


@pytest.mark.parametrize("at_url", [False, True])
@pytest.mark.parametrize("build", [encoder, two_towers, token_table])
def test_merged_encoders_are_loaded_and_encode(build: Any, at_url: bool, tmp_path: Path) -> None:
    models = []
    for seed, name in enumerate("ab"):
        parts = build(tmp_path / "parts" / name, 10 * seed)
        models.append(sentence_transformers.SentenceTransformer(modules=parts, device="cpu"))
        models[-1].save(str(tmp_path / name), create_model_card=False)
    files = {
        f"/{path.relative_to(tmp_path).as_posix()}": path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    with serving(FileServer(files)) as server:
        place = server.url if at_url else tmp_path
        recipe = {
            "merge_method": "linear",
            "models": [{"model": f"{place}/{name}"} for name in "ab"],
            "parameters": {"weight": 1.0},
        }
        fusekit.merge(recipe, tmp_path / "out", threads=2)
    merged = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    found, second = dict(merged.named_parameters()), dict(models[1].named_parameters())
    assert found
    for name, values in models[0].named_parameters():
        torch.testing.assert_close(found[name], (values + second[name]) / 2, msg=name)
    vectors = merged.encode(SENTENCES)
    assert np.isfinite(vectors).all()
    assert vectors.shape == models[0].encode(SENTENCES).shape
    assert fusekit.verify(tmp_path / "out").ok


def test_layers_of_the_encoder_are_stacked(tmp_path: Path) -> None:
    parts = encoder(tmp_path / "parts", 0)
    model = sentence_transformers.SentenceTransformer(modules=parts, device="cpu")
    model.save(str(tmp_path / "a"), create_model_card=False)
    ranges = ([0, 2], [1, 2])
    sources = [[{"model": str(tmp_path / "a"), "layer_range": layers}] for layers in ranges]
    recipe = {"merge_method": "passthrough", "slices": [{"sources": each} for each in sources]}
    fusekit.merge(recipe, tmp_path / "out", threads=2)
    deeper = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    state, own = deeper.state_dict(), model.state_dict()
    assert sum(".layer.2." in name for name in state) == len(
        [name for name in own if ".layer.1." in name]
    )
    for name, values in state.items():
        assert torch.equal(values, own[name.replace(".layer.2.", ".layer.1.")]), name
    assert np.isfinite(deeper.encode(SENTENCES)).all()
