import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from fusekit.checkpoint.memory import MemorySource
from fusekit.cli.tokens import app
from fusekit.errors import CheckpointError, FusekitError
from fusekit.tokenizers import transplant_folder
from fusekit.tokenizers.approximate import common_interpolation, omp
from fusekit.tokenizers.transplant import TransplantOptions, transplant
from fusekit.tokenizers.transplant_folder import transplant_tokens
from fusekit.tokenizers.vocabulary import Vocabulary, read_vocabulary
from tests.tokenizers.support import EMBED, VECTORS, bpe_document, write_model

HEAD = "lm_head.weight"
TOK_A = VECTORS / "mergekit_e2e" / "inputs" / "tok_a"
TOK_B = VECTORS / "mergekit_e2e" / "inputs" / "tok_b"
METHODS = [
    "omp",
    "common_interpolation",
    "subword",
    "mean",
    "zero",
    "randn",
    "john_hewitt",
    "landmark_pca",
]


def _vocabulary(tokens):
    return Vocabulary("memory", {t: i for i, t in enumerate(tokens)}, {}, {}, "metaspace")


def _random(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


MODEL = _vocabulary([f"t{i}" for i in range(30)])
DONOR = _vocabulary(["n0", *(f"t{i}" for i in range(0, 30, 2)), "n1", "n2"])
MODEL_ROWS, DONOR_ROWS = _random((30, 6)), _random((18, 5), 1)
SHARED_DONOR, SHARED_MODEL, NEW = np.arange(1, 16), np.arange(0, 30, 2), [0, 16, 17]


def _made(**options):
    return transplant(MODEL_ROWS, DONOR_ROWS, MODEL, DONOR, TransplantOptions(**options))


@pytest.mark.parametrize("method", [m for m in METHODS if m != "subword"])
def test_shared_tokens_keep_the_models_rows(method):
    rows = _made(method=method, k=3)
    assert rows.shape == (18, 6) and rows.dtype == np.float32
    np.testing.assert_array_equal(rows[SHARED_DONOR], MODEL_ROWS[SHARED_MODEL])
    assert np.isfinite(rows).all()


def test_new_rows_are_those_of_the_method():
    X, Y, targets = DONOR_ROWS[SHARED_DONOR], MODEL_ROWS[SHARED_MODEL], DONOR_ROWS[NEW]
    np.testing.assert_allclose(_made(k=3)[NEW], omp(targets, X, 3).read_in(Y), atol=1e-6)
    near = common_interpolation(targets, X, 4, cosine=True, scheme="least_squares")
    made = _made(
        method="common_interpolation", k=4, cosine=True, weight_scheme="least_squares", batch=1
    )
    np.testing.assert_allclose(made[NEW], near.read_in(Y), atol=1e-6)
    assert (_made(method="zero")[NEW] == 0).all()
    np.testing.assert_allclose(
        _made(method="mean")[NEW], np.tile(MODEL_ROWS.mean(axis=0), (3, 1)), atol=1e-6
    )


def test_k_is_reduced_to_the_shared_tokens():
    np.testing.assert_array_equal(_made(k=64), _made(k=15))


@pytest.mark.parametrize("method", ["randn", "john_hewitt"])
def test_random_rows_follow_the_seed_and_differ_between_embedding_and_head(method):
    np.testing.assert_array_equal(_made(method=method, seed=1), _made(method=method, seed=1))
    assert not np.array_equal(_made(method=method, seed=1), _made(method=method, seed=2))
    options = TransplantOptions(method=method, seed=1)
    head = transplant(MODEL_ROWS, DONOR_ROWS, MODEL, DONOR, options, head=True)
    assert not np.array_equal(_made(method=method, seed=1)[NEW], head[NEW])


def test_scale_and_noise_change_new_rows_only():
    plain, scaled, noisy = _made(k=3), _made(k=3, scale=0.5), _made(k=3, noise=0.1)
    np.testing.assert_allclose(scaled[NEW], 0.5 * plain[NEW], rtol=1e-6)
    assert 0 < np.abs(noisy[NEW] - plain[NEW]).max() < 1
    for rows in (scaled, noisy):
        np.testing.assert_array_equal(rows[SHARED_DONOR], plain[SHARED_DONOR])


@pytest.mark.parametrize(
    ("where", "head", "applies"),
    [
        ("none", False, False),
        ("embed", False, True),
        ("embed", True, False),
        ("lm_head", True, True),
        ("both", False, True),
        ("both", True, True),
    ],
)
def test_prefix_and_byte_matches_copy_rows_where_asked(where, head, applies):
    model = _vocabulary(["ab", "<0x0A>", "z"])
    donor = _vocabulary(["z", "abc", "\n"])
    rows = _random((3, 4))
    options = TransplantOptions(method="zero", prefix_match=where, byte_match=where)
    made = transplant(rows, _random((3, 2)), model, donor, options, head=head)
    np.testing.assert_array_equal(made[0], rows[2])
    np.testing.assert_array_equal(made[1:], rows[:2] if applies else np.zeros((2, 4)))


def test_untrained_tokens_are_zeroed_and_not_used():
    untrained = np.array([3, 4])
    rows = transplant(
        MODEL_ROWS, DONOR_ROWS, MODEL, DONOR, TransplantOptions(k=3), untrained=untrained
    )
    assert (rows[untrained] == 0).all()
    kept = ~np.isin(SHARED_DONOR, untrained)
    code = omp(DONOR_ROWS[NEW], DONOR_ROWS[SHARED_DONOR[kept]], 3)
    np.testing.assert_allclose(rows[NEW], code.read_in(MODEL_ROWS[SHARED_MODEL[kept]]), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_transplanting_to_the_own_tokenizer_is_the_identity(method, dtype):
    vocab = Vocabulary("memory", {"a": 0, "b": 1, "c": 4}, {}, {}, "metaspace")
    rows = _random((8, 4), dtype=dtype)
    made = transplant(rows, rows, vocab, vocab, TransplantOptions(method=method, k=2))
    np.testing.assert_array_equal(made, rows)


def test_ids_of_no_token_get_the_mean_and_ids_without_donor_row_zeros():
    donor = Vocabulary("memory", {"t0": 0, "t1": 2, "late": 5}, {}, {}, "metaspace")
    made = transplant(MODEL_ROWS, _random((4, 5)), MODEL, donor, TransplantOptions(k=1))
    assert made.shape == (6, 6)
    for unused in (1, 3, 4):
        np.testing.assert_allclose(made[unused], MODEL_ROWS.mean(axis=0), atol=1e-6)
    assert (made[5] == 0).all()


@pytest.mark.parametrize("method", ["omp", "common_interpolation", "landmark_pca"])
def test_vocabularies_without_a_common_token_are_refused(method):
    donor = _vocabulary(["x"])
    with pytest.raises(FusekitError, match=f"method '{method}' needs tokens .* they share none"):
        transplant(MODEL_ROWS, _random((1, 5)), MODEL, donor, TransplantOptions(method=method))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "opm"}, "method: unknown 'opm' .*did you mean 'omp'"),
        ({"weight_scheme": "barycentre"}, "weight_scheme: unknown .*did you mean 'barycentric'"),
        ({"prefix_match": "head"}, "prefix_match: unknown 'head'"),
        ({"k": 0}, "k: expected at least 1, found 0"),
        ({"batch": 0}, "batch: expected at least 1"),
        ({"noise": -1.0}, "noise: expected a standard deviation"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(FusekitError, match=message):
        TransplantOptions(**options)


# --- folders


@pytest.mark.parametrize("method", METHODS)
def test_writes_a_complete_folder(tmp_path, method):
    out = tmp_path / "out"
    report = transplant_tokens(TOK_A, TOK_B, out, TransplantOptions(method=method, k=8))
    assert (report.tokens, report.shared, report.rows) == (154, 54, 157)
    assert (report.digits, report.digits_shared) == (11, 0)
    written, model = load_file(out / "model.safetensors"), load_file(TOK_A / "model.safetensors")
    assert written.keys() == model.keys()
    for name, tensor in written.items():
        if name in (EMBED, HEAD):
            assert tensor.shape == (157, 64)
        else:
            np.testing.assert_array_equal(tensor, model[name])
    ours, theirs = read_vocabulary(TOK_A).ids, read_vocabulary(out).ids
    for token in ("▁model", "th", "<s>"):
        if token in ours and token in theirs:
            np.testing.assert_array_equal(written[HEAD][theirs[token]], model[HEAD][ours[token]])
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 157
    assert (out / "tokenizer.json").read_bytes() == (TOK_B / "tokenizer.json").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.torch
def test_the_folder_runs_in_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transplant_tokens(TOK_A, TOK_B, tmp_path / "out", TransplantOptions(k=8))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = tokenizer("return the model", return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
    assert logits.shape[-1] == 157 and bool(torch.isfinite(logits).all())


def test_the_own_tokenizer_reproduces_the_checkpoint(tmp_path):
    transplant_tokens(TOK_B, TOK_B, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in load_file(TOK_B / "model.safetensors").items():
        np.testing.assert_array_equal(written[name], tensor)


def _pair(tmp_path, model_tensors, donor_tensors, config=None, donor_config=None):
    tokens = ["<s>", *"abcdefgh", "<e>"]
    model = write_model(
        tmp_path / "model",
        bpe_document(tokens, special=["<s>", "<e>"]),
        model_tensors,
        {"vocab_size": 10, "eos_token_id": 9, "bos_token_id": 0} | (config or {}),
        {"eos_token": "<e>"},
    )
    donor = write_model(
        tmp_path / "donor",
        bpe_document([*"hgfedcba", "x", "<end>", "<s>"], special=["<end>", "<s>"]),
        donor_tensors,
        {"vocab_size": 11, "eos_token_id": [9, 10]} | (donor_config or {}),
        {"eos_token": "<end>"},
    )
    return model, donor


def test_tied_models_stay_tied_and_tied_donors_serve_both(tmp_path):
    tied, untied = {EMBED: _random((11, 4))}, {EMBED: _random((10, 3)), HEAD: _random((10, 3), 1)}
    model, donor = _pair(tmp_path, untied, tied)
    transplant_tokens(model, donor, tmp_path / "out", TransplantOptions(k=3))
    written = load_file(tmp_path / "out" / "model.safetensors")
    X = tied[EMBED][[*range(8), 9, 10]]
    Y = untied[HEAD][[8, 7, 6, 5, 4, 3, 2, 1, 9, 0]]
    expected = omp(tied[EMBED][8:9], X, 3).read_in(Y)[0]
    np.testing.assert_allclose(written[HEAD][8], expected, atol=1e-5)
    for folder in (model, donor):
        shutil.rmtree(folder)
    model, donor = _pair(tmp_path, {EMBED: _random((10, 3))}, tied)
    transplant_tokens(model, donor, tmp_path / "tied", TransplantOptions(k=3))
    assert list(load_file(tmp_path / "tied" / "model.safetensors")) == [EMBED]


def test_special_ids_are_the_donors_and_other_ids_follow_their_tokens(tmp_path):
    model, donor = _pair(
        tmp_path,
        {EMBED: _random((10, 3))},
        {EMBED: _random((11, 4))},
        config={"image_token_id": 2, "pad_token_id": 3},
    )
    (model / "generation_config.json").write_text('{"eos_token_id": 9, "temperature": 0.5}')
    (donor / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    transplant_tokens(model, donor, tmp_path / "out", TransplantOptions(k=3))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {
        "vocab_size": 11,
        "eos_token_id": [9, 10],
        "bos_token_id": None,
        "pad_token_id": None,
        "image_token_id": 6,
    }
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [8, 9], "temperature": 0.5}


def test_biases_follow_their_tokens(tmp_path):
    bias = np.arange(10, dtype=np.float32)
    model, donor = _pair(
        tmp_path,
        {EMBED: _random((10, 3)), "lm_head.bias": bias},
        {EMBED: _random((11, 4))},
    )
    transplant_tokens(model, donor, tmp_path / "out", TransplantOptions(k=3))
    written = load_file(tmp_path / "out" / "model.safetensors")["lm_head.bias"]
    np.testing.assert_array_equal(written, [8, 7, 6, 5, 4, 3, 2, 1, 4.5, 9, 0])


def test_large_outputs_are_sharded_with_an_index(tmp_path):
    out = tmp_path / "out"
    transplant_tokens(TOK_A, TOK_B, out, TransplantOptions(method="mean"), shard_bytes=100_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    for name, file in index.items():
        assert name in load_file(out / file)


def test_poorly_trained_tokens_are_zeroed_on_request(tmp_path):
    tokens = [f"t{i}" for i in range(300)]
    rows = _random((310, 8))
    rows[5] = 1e-6
    config = {"vocab_size": 310}
    document = bpe_document(tokens)
    model = write_model(tmp_path / "model", document, {EMBED: rows}, config)
    donor = write_model(tmp_path / "donor", document, {EMBED: rows}, config)
    options = TransplantOptions(zero_untrained=True)
    report = transplant_tokens(model, donor, tmp_path / "out", options)
    written = load_file(tmp_path / "out" / "model.safetensors")[EMBED]
    zeroed = np.flatnonzero((written == 0).all(axis=1))
    assert 5 in zeroed and len(zeroed) == report.zeroed < 20


def test_notes_say_what_was_reduced_or_ignored(tmp_path):
    model, donor = _pair(tmp_path, {EMBED: _random((10, 3))}, {EMBED: _random((11, 4))})
    report = transplant_tokens(model, donor, tmp_path / "out")
    assert report.notes == ("k reduced from 64 to 10, the shared tokens",)


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(self, name, start, stop, out):
        raise CheckpointError("the disk is gone")

    monkeypatch.setattr(MemorySource, "read_into", fail)
    with pytest.raises(CheckpointError, match="the disk is gone"):
        transplant_tokens(TOK_A, TOK_B, tmp_path / "out", TransplantOptions(method="mean"))
    assert list(tmp_path.iterdir()) == []


def test_wrong_folders_are_refused_before_work_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(transplant_folder, "transplant", lambda *_, **__: pytest.fail("started"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FusekitError, match="full: already exists"):
        transplant_tokens(TOK_A, TOK_B, tmp_path / "full")
    bare = write_model(tmp_path / "bare", None, {EMBED: _random((10, 3))}, {"vocab_size": 10})
    with pytest.raises(CheckpointError, match="bare: no tokenizer found"):
        transplant_tokens(TOK_A, bare, tmp_path / "out")
    document = bpe_document(["a"])
    headless = write_model(tmp_path / "headless", document, {"norm.weight": _random(3)}, {})
    with pytest.raises(CheckpointError, match="headless: no token embedding found"):
        transplant_tokens(TOK_A, headless, tmp_path / "out")
    (headless / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"headless: no config\.json"):
        transplant_tokens(headless, TOK_B, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- command line


def test_the_command_writes_the_folder_and_reports(tmp_path):
    result = CliRunner().invoke(
        app, ["transplant", str(TOK_A), str(TOK_B), str(tmp_path / "out"), "--k", "8"]
    )
    assert result.exit_code == 0, result.output
    assert "154 tokens, 54 shared, 157 rows; digit tokens shared: 0 of 11" in result.output
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_command_refuses_a_donor_without_tokenizer(tmp_path):
    arguments = ["transplant", str(TOK_A), str(tmp_path), str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, CheckpointError)
    assert "no tokenizer found" in str(result.exception)


def test_the_command_refuses_unknown_choices(tmp_path):
    arguments = ["transplant", str(TOK_A), str(TOK_B), str(tmp_path / "out"), "--method", "opm"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "opm" in result.output


def test_the_commands_choices_are_the_options_choices():
    from typing import get_args

    from fusekit.cli import tokens
    from fusekit.tokenizers import approximate
    from fusekit.tokenizers import transplant as options

    for shown, accepted in (
        (tokens.Method, options.Method),
        (tokens.Where, options.Where),
        (tokens.WeightScheme, approximate.WeightScheme),
        (tokens.SubwordRule, approximate.SubwordRule),
    ):
        assert tuple(choice.value for choice in shown) == get_args(accepted)
