"""Adapters trained with PEFT: where its weighted combination is right ours is equal to the bit,
where it is wrong ours equals the merge of the dense models."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from fusekit.adapters import MergeOptions, load_adapter, merge_adapters, write_adapter  # noqa: E402
from fusekit.checkpoint.memory import MemorySource  # noqa: E402

pytestmark = pytest.mark.torch

torch.set_num_threads(1)

VOCABULARY, LENGTH = 24, 12


def tiny_gpt():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.2,
    )
    return transformers.GPT2LMHeadModel(config).eval()


def task_tokens(task):
    """Counting upwards by a task's own step."""
    starts = torch.arange(VOCABULARY)[:, None]
    return (starts + (task + 1) * torch.arange(LENGTH)[None, :]) % VOCABULARY


def task_loss(model, task):
    tokens = task_tokens(task)
    return model(input_ids=tokens, labels=tokens).loss


def train_adapter(folder, task, **options):
    """A LoRA adapter really trained on one task, saved by PEFT."""
    config = peft.LoraConfig(
        lora_alpha=8,
        task_type="CAUSAL_LM",
        **{"r": 4, "target_modules": ["c_attn", "mlp.c_proj"], "lora_dropout": 0.0, **options},
    )
    torch.manual_seed(task)
    model = peft.get_peft_model(tiny_gpt(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        task_loss(model, task).backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of trained adapters, each trained once per module."""
    root = tmp_path_factory.mktemp("adapters")
    made = {}

    def get(task, **options):
        key = repr((task, sorted(options.items())))
        if key not in made:
            made[key] = train_adapter(root / f"a{len(made)}", task, **options)
        return made[key]

    return get


def base_weights():
    return {k: v.numpy() for k, v in tiny_gpt().state_dict().items()}


def dense_merge(folders, weights):
    """Base + weighted sum of the dense updates PEFT itself computes, per changed tensor."""
    base = base_weights()
    total = {k: v.astype(np.float64) for k, v in base.items()}
    for folder, weight in zip(folders, weights, strict=True):
        model = peft.PeftModel.from_pretrained(tiny_gpt(), folder).merge_and_unload()
        for key, value in model.state_dict().items():
            total[key] += weight * (value.numpy().astype(np.float64) - base[key])
    return total


def peft_model(folders, weights, **arguments):
    """A PEFT model with the weighted adapter active."""
    model = peft.PeftModel.from_pretrained(tiny_gpt(), folders[0], adapter_name="a0")
    for i, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, adapter_name=f"a{i}")
    names = [f"a{i}" for i in range(len(folders))]
    model.add_weighted_adapter(names, weights, "merged", **arguments)
    model.set_adapter("merged")
    return model


def worst_error(state, truth):
    return max(np.abs(state[key] - truth[key]).max() for key in truth)


def merged_by_peft(folders, weights, **arguments):
    merged = peft_model(folders, weights, **arguments).merge_and_unload()
    return {k: v.numpy() for k, v in merged.state_dict().items()}


def merged_by_us(folders, weights, method, options=None, base=None):
    adapter = merge_adapters([load_adapter(f) for f in folders], method, weights, options, base)
    return {k: adapter.apply(k, v) for k, v in base_weights().items()}


@pytest.mark.parametrize("method", ["cat", "linear", "ties", "magnitude_prune"])
def test_factor_methods_equal_peft_to_the_bit(method, trained):
    folders = [trained(task) for task in range(3)]
    weights = [0.5, -0.3, 0.8]
    density = None if method in {"cat", "linear"} else 0.5
    model = peft_model(folders, weights, combination_type=method, density=density)
    options = MergeOptions(convention="peft", density=density)
    ours = merge_adapters([load_adapter(f) for f in folders], method, weights, options)
    theirs = model.state_dict()
    for name, module in ours.modules.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        for factor, array in (("A", module.A), ("B", module.B)):
            expected = theirs[f"{key}.lora_{factor}.merged.weight"].numpy()
            np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("method", ["svd", "ties_svd", "magnitude_prune_svd"])
def test_svd_methods_equal_peft_in_the_update(method, trained):
    folders = [trained(task) for task in range(2)]
    density = None if method == "svd" else 0.5
    theirs = merged_by_peft(folders, [1.0, 0.5], combination_type=method, density=density)
    options = MergeOptions(convention="peft", density=density)
    ours = merged_by_us(folders, [1.0, 0.5], method, options)
    assert worst_error(ours, theirs) < 1e-5


def test_rslora_sources_keep_their_size(trained):
    folders = [trained(task, use_rslora=True) for task in range(2)]
    truth = dense_merge(folders, [0.5, 0.5])
    assert worst_error(merged_by_us(folders, [0.5, 0.5], "cat"), truth) < 1e-5
    assert worst_error(merged_by_peft(folders, [0.5, 0.5], combination_type="cat"), truth) > 0.05


def test_dora_sources_keep_their_magnitudes(trained):
    folders = [trained(task, use_dora=True) for task in range(2)]
    truth = dense_merge(folders, [0.5, 0.5])
    base = MemorySource(base_weights())
    full = MergeOptions(rank=16)
    assert worst_error(merged_by_us(folders, [0.5, 0.5], "svd", full, base), truth) < 1e-5
    theirs = merged_by_peft(folders, [0.5, 0.5], combination_type="svd", svd_rank=16)
    assert worst_error(theirs, truth) > 0.01


def test_a_rank_beyond_the_matrix_is_cut_to_it(trained, tmp_path):
    folders = [trained(task) for task in range(2)]
    truth = dense_merge(folders, [1.0, 1.0])
    adapters = [load_adapter(folder) for folder in folders]
    merged = merge_adapters(adapters, "svd", [1.0, 1.0], MergeOptions(rank=64))
    write_adapter(merged, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(tiny_gpt(), tmp_path / "ours").merge_and_unload()
    state = {k: v.numpy() for k, v in loaded.state_dict().items()}
    assert worst_error(state, truth) < 1e-5
    arguments = {"combination_type": "svd", "svd_rank": 64}
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        peft_model(folders, [1.0, 1.0], **arguments)
    model = peft_model(folders, [1.0, 1.0], svd_full_matrices=False, **arguments)
    model.save_pretrained(tmp_path / "theirs", selected_adapters=["merged"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(tiny_gpt(), tmp_path / "theirs" / "merged")


def test_module_biases_survive(trained, tmp_path):
    folders = [trained(task, lora_bias=True) for task in range(2)]
    truth = dense_merge(folders, [0.5, 0.5])
    assert worst_error(merged_by_us(folders, [0.5, 0.5], "cat"), truth) < 1e-5
    assert worst_error(merged_by_peft(folders, [0.5, 0.5], combination_type="cat"), truth) > 0.01
    merged = merge_adapters([load_adapter(f) for f in folders], "cat", [0.5, 0.5])
    write_adapter(merged, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(tiny_gpt(), tmp_path / "ours").merge_and_unload()
    assert worst_error({k: v.numpy() for k, v in loaded.state_dict().items()}, truth) < 1e-5


def test_rank_patterns_can_be_loaded_again(trained, tmp_path):
    pattern = {"rank_pattern": {"mlp.c_proj": 2}}
    folders = [trained(task, **pattern) for task in range(2)]
    model = peft_model(folders, [0.5, 0.5], combination_type="linear")
    model.save_pretrained(tmp_path / "theirs", selected_adapters=["merged"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(tiny_gpt(), tmp_path / "theirs" / "merged")
    options = MergeOptions(convention="peft")
    merged = merge_adapters([load_adapter(f) for f in folders], "linear", [0.5, 0.5], options)
    write_adapter(merged, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(tiny_gpt(), tmp_path / "ours").merge_and_unload()
    state = {k: v.numpy() for k, v in loaded.state_dict().items()}
    expected = {k: merged.apply(k, v) for k, v in base_weights().items()}
    assert worst_error(state, expected) < 1e-5


@pytest.mark.parametrize("method", ["cat", "svd", "lora_lego", "knots_ties", "ties_svd"])
def test_merged_adapters_help_on_both_tasks(method, trained, tmp_path):
    folders = [trained(task) for task in range(2)]
    density = 0.5 if method == "ties_svd" else None
    rank = None if method == "cat" else 8
    options = MergeOptions(density=density, rank=rank)
    merged = merge_adapters([load_adapter(f) for f in folders], method, [0.7, 0.7], options)
    write_adapter(merged, tmp_path / "merged")
    base = tiny_gpt()
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "merged")
    with torch.no_grad():
        for task in range(2):
            assert task_loss(model, task) < task_loss(base, task) - 0.1
