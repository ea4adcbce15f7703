"""What PEFT itself writes and loads: every option's dense merge, and adapters of ours in PEFT."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from fusekit.adapters import load_adapter, write_adapter  # noqa: E402

pytestmark = pytest.mark.torch
torch.set_num_threads(1)


class Net(torch.nn.Module):
    """Every kind of layer PEFT's LoRA adapts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(11, 12)
        self.conv = torch.nn.Conv2d(3, 6, 3)
        self.point = torch.nn.Conv2d(6, 4, 1)
        self.q_proj = torch.nn.Linear(12, 12)
        self.body = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(12, 8)})
        self.head = torch.nn.Linear(8, 5)

    def forward(self, tokens, image):
        hidden = self.embed(tokens).mean(dim=1)
        hidden = hidden + self.point(self.conv(image)).flatten(1)[:, :12]
        return self.head(torch.tanh(self.body["q_proj"](torch.tanh(self.q_proj(hidden)))))


OPTIONS = {
    "plain": {"target_modules": ["q_proj"]},
    "namesake left alone": {"target_modules": "q_proj"},
    "regex": {"target_modules": r"body\.q_.*|head"},
    "patterns": {
        "target_modules": ["q_proj", "head"],
        "rank_pattern": {"body.q_proj": 2},
        "alpha_pattern": {"head": 3},
    },
    "rslora": {
        "target_modules": ["q_proj"],
        "use_rslora": True,
        "rank_pattern": {"body.q_proj": 3},
    },
    "dora": {"target_modules": ["q_proj", "head"], "use_dora": True},
    "dora conv embedding": {"target_modules": ["conv", "point", "embed"], "use_dora": True},
    "lora_bias": {"target_modules": ["q_proj", "conv"], "lora_bias": True},
    "bias lora_only": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "bias all": {"target_modules": ["q_proj"], "bias": "all"},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["head"]},
    "embedding and conv": {"target_modules": ["embed", "conv", "point"]},
}


def trained(options):
    """A PEFT model with random values in everything the adapter trains."""
    model = peft.get_peft_model(
        Net(), peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.0, **options)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def inputs():
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 11, (3, 4), generator=generator), torch.randn(
        3, 3, 4, 4, generator=generator
    )


def dense_merge(options, folder):
    """PEFT's merged state dict, the base's state dict, and the model's output."""
    model = trained(options)
    with torch.no_grad():
        output = model(*inputs()).numpy()
    model.save_pretrained(folder)
    merged = model.merge_and_unload().state_dict()
    return merged, Net().state_dict(), output


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_folds_in_as_peft_merges_it(name, tmp_path):
    merged, base, _ = dense_merge(OPTIONS[name], tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    changed = {k for k in base if not torch.equal(base[k], merged[k])}
    assert changed
    assert changed <= set(adapter.changed_tensors())
    for key, weight in base.items():
        np.testing.assert_allclose(
            adapter.apply(key, weight.numpy()), merged[key].numpy(), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("name", OPTIONS)
def test_what_we_write_loads_in_peft_without_a_warning(name, tmp_path):
    _, _, expected = dense_merge(OPTIONS[name], tmp_path / "adapter")
    write_adapter(load_adapter(tmp_path / "adapter"), tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours").eval()
        with torch.no_grad():
            output = model(*inputs()).numpy()
    np.testing.assert_allclose(output, expected, atol=1e-5)


def test_a_bin_file_reads_like_a_safetensors_file(tmp_path):
    model = trained(OPTIONS["dora"])
    model.save_pretrained(tmp_path / "new")
    model.save_pretrained(tmp_path / "old", safe_serialization=False)
    new, old = load_adapter(tmp_path / "new"), load_adapter(tmp_path / "old")
    assert set(new.modules) == set(old.modules)
    for name, module in new.modules.items():
        for field in ("A", "B", "magnitude"):
            np.testing.assert_array_equal(getattr(module, field), getattr(old.modules[name], field))


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x):
        return torch.einsum("bi,eoi->beo", x, self.up)


class Sparse(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = torch.nn.ModuleDict({"experts": Experts()})

    def forward(self, x):
        return self.mlp["experts"](x)


def test_raw_expert_parameters_fold_in_and_load_in_peft(tmp_path):
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=[], target_parameters=["experts.up"], lora_dropout=0.0
    )
    model = peft.get_peft_model(Sparse(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    x = torch.randn(2, 5)
    with torch.no_grad():
        output = model(x)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload().state_dict()
    adapter = load_adapter(tmp_path / "adapter")
    assert list(adapter.modules) == ["mlp.experts.up"]
    for name, weight in Sparse().state_dict().items():
        folded = adapter.apply(name, weight.numpy())
        np.testing.assert_allclose(folded, merged[name].numpy(), atol=1e-5)
    write_adapter(adapter, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(Sparse(), tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), output)
