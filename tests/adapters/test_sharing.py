from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import nn  # noqa: E402

from fusekit.adapters import load_adapter  # noqa: E402
from fusekit.adapters.mos import (  # noqa: E402
    MosConfig,
    MosLinear,
    MosPool,
    attach_mos,
    draw_indices,
    export_mos,
    load_mos,
    save_mos,
)
from fusekit.adapters.polyhistor import (  # noqa: E402
    Polyhistor,
    PolyhistorConfig,
    attach_polyhistor,
    load_polyhistor,
    save_polyhistor,
)
from fusekit.errors import CheckpointError, FusekitError  # noqa: E402

from .support import load_vectors, under  # noqa: E402

pytestmark = pytest.mark.torch
torch.set_num_threads(1)


def tiny_llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=24,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
    ).eval()


def tiny_gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=24, n_positions=12, n_embd=16, n_layer=2, n_head=2)
    ).eval()


TOKENS = (torch.arange(24)[:, None] + 3 * torch.arange(12)[None, :]) % 24


def logits(model):
    with torch.no_grad():
        return model(TOKENS[:4]).logits


def train(model, steps=20):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_golden_mos_layers(case):
    tensors, cases = load_vectors("mos")
    meta = cases[case]
    tensors = {k: torch.from_numpy(v) for k, v in under(tensors, f"{case}/").items()}
    config = MosConfig(
        target_modules=("q",),
        rank=meta["r"],
        equivalent_rank=meta["e_equiv_rank"],
        private_rank=meta["private_rank"],
        shards=meta["shards_per_vector"],
        alpha=meta["lora_alpha"],
    )
    pool = MosPool(config, meta["num_layers"], meta["d_in"], meta["d_out"])
    assert pool.A.shape == tensors["in/pool_A"].shape
    assert pool.B.shape == tensors["in/pool_B"].shape
    pool.load_state_dict({"A": tensors["in/pool_A"], "B": tensors["in/pool_B"]})
    for k in range(meta["num_layers"]):
        base = nn.Linear(meta["d_in"], meta["d_out"], bias=False)
        base.weight.data = tensors[f"in/layer{k}/W"]
        indices = tensors[f"in/layer{k}/idx_A"], tensors[f"in/layer{k}/idx_B"]
        layer = MosLinear(base, pool, config, *indices)
        A, B = layer.factors()
        torch.testing.assert_close(A, tensors[f"out/layer{k}/A"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(B, tensors[f"out/layer{k}/B"], atol=1e-5, rtol=1e-5)
        y = layer(tensors["in/x"])
        torch.testing.assert_close(y, tensors[f"out/layer{k}/y"], atol=1e-5, rtol=1e-5)
        drawn = draw_indices(config, meta["num_layers"], k, f"layer{k}")
        private = meta["private_rank"] * meta["shards_per_vector"]
        for mine, golden in zip(drawn, indices, strict=True):
            assert len(mine) == len(golden) == len(set(mine.tolist()))
            assert mine[len(mine) - private :].tolist() == golden[len(golden) - private :].tolist()


CONFIG = MosConfig(("q_proj", "v_proj"), rank=4, equivalent_rank=2, private_rank=1, shards=2)


def test_mos_starts_as_the_base_and_counts_as_promised():
    model = tiny_llama()
    before = logits(model)
    names = attach_mos(model, CONFIG)
    assert len(names) == 6
    torch.testing.assert_close(logits(model), before, atol=0, rtol=0)
    assert trainable(model) == 2 * 3 * ((16 + 16) + (16 + 8))


@pytest.mark.parametrize(
    ("build", "targets"), [(tiny_llama, ("q_proj", "v_proj")), (tiny_gpt2, ("c_attn", "c_fc"))]
)
def test_mos_trains_saves_loads_and_exports(build, targets, tmp_path):
    peft = pytest.importorskip("peft")
    model = build()
    config = MosConfig(targets, rank=3, equivalent_rank=2, private_rank=1, shards=2)
    attach_mos(model, config)
    losses = train(model.train())
    assert losses[-1] < losses[0] - 0.05
    trained = logits(model.eval())
    save_mos(model, config, tmp_path / "mos")
    fresh = build()
    assert load_mos(fresh, tmp_path / "mos") == config
    torch.testing.assert_close(logits(fresh), trained, atol=1e-6, rtol=1e-6)
    export_mos(model, tmp_path / "lora", {"task_type": "CAUSAL_LM"})
    assert {m.rank for m in load_adapter(tmp_path / "lora").modules.values()} == {3}
    exported = peft.PeftModel.from_pretrained(build(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(exported), trained, atol=1e-5, rtol=1e-5)


def test_a_shard_two_layers_use_gets_both_gradients():
    config = MosConfig(("q",), rank=2, equivalent_rank=1, shards=1)
    model = nn.Sequential()
    for i in range(2):
        model.add_module(str(i), nn.Module())
        model.get_submodule(str(i)).q = nn.Linear(4, 4)
    attach_mos(model, config)
    layers = [model.get_submodule(f"{i}.q") for i in range(2)]
    layers[0].pool.B.data.normal_()
    x = torch.randn(3, 4)
    separate = []
    for layer in layers:
        layer.pool.A.grad = None
        layer(x).square().sum().backward()
        separate.append(layer.pool.A.grad.clone())
    layers[0].pool.A.grad = None
    sum(layer(x).square().sum() for layer in layers).backward()
    torch.testing.assert_close(layers[0].pool.A.grad, separate[0] + separate[1])


def test_all_private_shards_are_plain_lora():
    model = tiny_llama()
    attach_mos(model, MosConfig(("q_proj",), rank=2, equivalent_rank=2, private_rank=2, shards=2))
    used = [
        set(module.index_a.tolist()) for module in model.modules() if isinstance(module, MosLinear)
    ]
    assert sum(len(indices) for indices in used) == len(set.union(*used))
    pool = next(m for m in model.modules() if isinstance(m, MosPool))
    assert set.union(*used) == set(range(len(pool.A)))


def test_a_mixture_without_sharing_is_lora_in_values_and_gradients():
    torch.manual_seed(1)
    config = MosConfig(("q",), rank=3, equivalent_rank=3, private_rank=3, shards=2, alpha=6)
    model = nn.Sequential()
    for i in range(2):
        model.add_module(str(i), nn.Module())
        model.get_submodule(str(i)).q = nn.Linear(4, 8)
    attach_mos(model, config)
    layer = model.get_submodule("1.q")
    layer.pool.B.data.normal_()
    A, B = (factor.detach().clone().requires_grad_() for factor in layer.factors())
    x = torch.randn(5, 4)
    plain = layer.base_layer(x) + 2.0 * x @ A.T @ B.T
    torch.testing.assert_close(layer(x), plain)
    layer(x).square().sum().backward()
    plain.square().sum().backward()
    for pool, index, factor in (
        (layer.pool.A, layer.index_a, A),
        (layer.pool.B, layer.index_b, B.T),
    ):
        gradient = factor.grad if factor is A else B.grad.T
        torch.testing.assert_close(pool.grad[index].reshape(3, -1), gradient)
        unused = [i for i in range(len(pool)) if i not in index.tolist()]
        assert pool.grad[unused].abs().max() == 0


@pytest.mark.parametrize(
    "ablation",
    [{"dissociate": False}, {"shards": 1}, {"private_rank": 0}, {"rank": 6, "private_rank": 0}],
)
def test_ablated_mixtures_cost_the_same_and_still_start_as_the_base(ablation, tmp_path):
    peft = pytest.importorskip("peft")
    config = dataclasses.replace(CONFIG, **ablation)
    model = tiny_llama()
    before = logits(model)
    attach_mos(model, config)
    torch.testing.assert_close(logits(model), before, atol=0, rtol=0)
    assert trainable(model) == 2 * 3 * ((16 + 16) + (16 + 8))
    losses = train(model.train(), steps=5)
    assert losses[-1] < losses[0]
    export_mos(model, tmp_path / "lora", {"task_type": "CAUSAL_LM"})
    exported = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(exported), logits(model.eval()), atol=1e-5, rtol=1e-5)


def test_indices_depend_on_the_layer_not_on_the_order():
    first = draw_indices(CONFIG, 3, 1, "layers.1.q_proj")
    again = draw_indices(CONFIG, 3, 1, "layers.1.q_proj")
    assert [i.tolist() for i in first] == [i.tolist() for i in again]
    assert first[0].tolist() != first[1].tolist()
    paired = MosConfig(("q",), rank=6, equivalent_rank=2, dissociate=False)
    same = draw_indices(paired, 3, 0, "layers.0.q")
    assert same[0].tolist() == same[1].tolist()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ("nothing",)}, "no linear layer is named nothing"),
        ({"shards": 3}, "3 shards do not divide its sizes"),
        ({"rank": 9}, "8 shared vectors per layer are more than the 3"),
    ],
)
def test_mos_sizes_that_cannot_be_are_refused(fields, message):
    fields = {"target_modules": ("q_proj",), "rank": 4, "equivalent_rank": 2, **fields}
    with pytest.raises(FusekitError, match=message):
        attach_mos(tiny_llama(), MosConfig(private_rank=1, **fields))


def test_a_private_rank_over_the_budget_is_refused():
    with pytest.raises(FusekitError, match="private_rank is 3, expected 0 to 2"):
        MosConfig(("q",), rank=4, equivalent_rank=2, private_rank=3)


def test_mos_of_another_model_is_refused(tmp_path):
    model = tiny_llama()
    attach_mos(model, CONFIG)
    save_mos(model, CONFIG, tmp_path / "mos")
    facts = json.loads((tmp_path / "mos" / "mos_config.json").read_text())
    facts["layers"].pop("model.layers.0.self_attn.q_proj")
    (tmp_path / "mos" / "mos_config.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.self_attn\.q_proj' is in the"):
        load_mos(tiny_llama(), tmp_path / "mos")
    with pytest.raises(CheckpointError, match="not a mixture of shards"):
        load_mos(tiny_llama(), tmp_path)


def golden_polyhistor(meta, tensors):
    config = PolyhistorConfig(
        tasks=meta["tasks"],
        task_size=meta["k_task"],
        layer_size=meta["k_layer"],
        rank=meta["r"],
        reduction=meta["d1"] // meta["n1"],
        lite=meta["lite"],
    )
    model = Polyhistor([m * meta["d1"] for m in meta["stage_mults"]], config)
    state = {f"task_embeddings.{t}": row for t, row in enumerate(tensors["in/task_emb"])}
    if meta["lite"]:
        state["layer_embedding"] = tensors["in/layer_emb"]
    networks = 1 if meta["lite"] else len(meta["stage_mults"])
    for network in range(networks):
        prefix = "in/" if meta["lite"] else f"in/layer{network}/"
        for side in ("down", "up"):
            for matrix in ("Wp", "Wq"):
                state[f"{side}.{network}.{matrix}"] = tensors[f"{prefix}{matrix}_{side}"]
    for key in model.kernels:
        side, position, task = key.split("_")
        state[f"kernels.{key}"] = tensors[f"in/layer{position}/task{task}/K_{side}"]
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_golden_polyhistor_adapters(case):
    tensors, cases = load_vectors("polyhistor")
    meta = cases[case]
    tensors = {k: torch.from_numpy(v) for k, v in under(tensors, f"{case}/").items()}
    model = golden_polyhistor(meta, tensors)
    for position in range(len(meta["stage_mults"])):
        x = tensors[f"in/layer{position}/x"]
        for task in range(meta["tasks"]):
            down, up = model.weights(position, task)
            out = f"out/layer{position}/task{task}"
            torch.testing.assert_close(down, tensors[f"{out}/W_down"], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(up, tensors[f"{out}/W_up"], atol=1e-4, rtol=1e-4)
            y = model(x, position, task)
            torch.testing.assert_close(y, tensors[f"{out}/y"], atol=1e-4, rtol=1e-4)
            dense = x + nn.functional.gelu(x @ down) @ up
            torch.testing.assert_close(y, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lite", [True, False])
def test_polyhistor_parameters_follow_the_formula(lite):
    config = PolyhistorConfig(tasks=3, task_size=5, layer_size=4, rank=2, reduction=4, lite=lite)
    model = Polyhistor([8, 16, 32], config)
    kernels = 3 * 2 * (2**2 + 4**2)
    if lite:
        expected = 2 * (5 + 4) * 2 * (8 + 2) + 3 * 5 + 3 * 4 + kernels
    else:
        expected = 3 * 2 * 5 * 2 * (8 + 2) + 3 * 5 + kernels
    assert sum(p.numel() for p in model.parameters()) == expected


def blocks_of(model):
    return {f"model.layers.{i}.{part}": 16 for i in range(3) for part in ("self_attn", "mlp")}


@pytest.mark.parametrize("lite", [True, False])
def test_polyhistor_trains_tasks_apart_saves_and_loads(lite, tmp_path):
    model = tiny_llama()
    before = logits(model)
    config = PolyhistorConfig(tasks=2, task_size=6, layer_size=4, reduction=4, lite=lite)
    attached = attach_polyhistor(model, blocks_of(model), config)
    torch.testing.assert_close(logits(model), before, atol=0, rtol=0)
    attached.task = 1
    losses = train(model.train())
    assert losses[-1] < losses[0] - 0.05
    model.eval()
    trained = logits(model)
    attached.task = 0
    assert (logits(model) - trained).abs().max() > 1e-3
    save_polyhistor(attached, tmp_path / "poly")
    fresh = tiny_llama()
    again = load_polyhistor(fresh, tmp_path / "poly")
    again.task = 1
    torch.testing.assert_close(logits(fresh), trained, atol=1e-6, rtol=1e-6)
    again.detach()
    torch.testing.assert_close(logits(fresh), before, atol=0, rtol=0)


def test_a_new_task_trains_its_own_parameters_alone(tmp_path):
    config = PolyhistorConfig(tasks=2, task_size=6, layer_size=4, reduction=4)
    model = Polyhistor([8, 16], config)
    for template in model.up:
        template.Wq.data.normal_()
    x = torch.randn(3, 16)
    old = model(x, 1, 0).detach()
    task = model.add_task()
    assert task == 2
    fresh = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in fresh) == 6 + 2 * 2**2
    model(x, 1, task).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in fresh)
    torch.testing.assert_close(model(x, 1, 0), old)
    attached = attach_polyhistor(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16)), {"0": 8, "1": 16}, config, model
    )
    save_polyhistor(attached, tmp_path / "poly")
    again = load_polyhistor(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16)), tmp_path / "poly")
    torch.testing.assert_close(again.adapters(x, 1, task), model(x, 1, task))


@pytest.mark.parametrize("lite", [True, False])
@pytest.mark.parametrize("tasks", [1, 3])
def test_new_adapters_change_nothing_at_any_width(lite, tasks):
    config = PolyhistorConfig(tasks=tasks, task_size=6, layer_size=4, reduction=4, lite=lite)
    model = Polyhistor([8, 16, 32], config)
    for position, width in enumerate((8, 16, 32)):
        x = torch.randn(3, 5, width)
        for task in range(tasks):
            torch.testing.assert_close(model(x, position, task), x, atol=0, rtol=0)


@pytest.mark.parametrize("lite", [True, False])
def test_generated_and_materialised_adapters_are_the_same_bottlenecks(lite):
    config = PolyhistorConfig(tasks=2, task_size=6, layer_size=4, reduction=4, lite=lite)
    model = Polyhistor([8, 24], config)
    for parameter in model.parameters():
        parameter.data.normal_()
    x = torch.randn(3, 24)
    for task in range(2):
        down, up = model.weights(1, task)
        assert down.shape == (24, 6)
        hidden = nn.functional.gelu(x @ down)
        torch.testing.assert_close(model(x, 1, task), x + hidden @ up, atol=1e-3, rtol=1e-4)
        kernel = model.kernels[f"down_1_{task}"]
        torch.testing.assert_close(down, torch.kron(kernel, model.templates(1, task)[0]))


def test_equal_widths_need_no_kernels_and_give_products_of_two_small_matrices():
    config = PolyhistorConfig(tasks=2, task_size=6, layer_size=4, rank=1, reduction=2)
    model = Polyhistor([8, 8], config)
    for parameter in model.parameters():
        parameter.data.normal_()
    assert len(model.kernels) == 0
    for position in range(2):
        down, up = model.weights(position, 0)
        assert torch.linalg.matrix_rank(down) == torch.linalg.matrix_rank(up) == 1


@pytest.mark.parametrize("lite", [True, False])
def test_every_parameter_of_a_task_is_trained_by_its_loss(lite):
    config = PolyhistorConfig(tasks=2, task_size=6, layer_size=4, reduction=4, lite=lite)
    model = Polyhistor([8, 16], config)
    for parameter in model.parameters():
        parameter.data.normal_()
    x = [torch.randn(3, 8), torch.randn(3, 16)]
    sum(model(x[position], position, 1).square().sum() for position in range(2)).backward()
    for name, parameter in model.named_parameters():
        others = name == "task_embeddings.0" or (
            name.startswith("kernels.") and name.endswith("_0")
        )
        used = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert used != others, name


def test_tasks_are_permuted_with_their_embeddings_and_kernels():
    model = Polyhistor([8, 16], PolyhistorConfig(tasks=2, task_size=6, layer_size=4, reduction=4))
    for parameter in model.parameters():
        parameter.data.normal_()
    other = copy.deepcopy(model)
    state = model.state_dict()
    swapped = dict(state)
    for key in state:
        if key.startswith(("task_embeddings.", "kernels.")):
            twin = key[:-1] + str(1 - int(key[-1]))
            swapped[key] = state[twin]
    other.load_state_dict(swapped)
    x = torch.randn(3, 16)
    torch.testing.assert_close(model(x, 1, 0), other(x, 1, 1))


@pytest.mark.parametrize(
    ("widths", "fields", "message"),
    [
        ([8, 12], {}, "width 12 is not a multiple of the smallest width, 8"),
        ([8], {"reduction": 16}, "leaves no bottleneck at width 8"),
        ([8], {"activation": "geru"}, "activation is 'geru'"),
        ([8], {"tasks": 0}, "all sizes must be 1 or more"),
    ],
)
def test_polyhistor_sizes_that_cannot_be_are_refused(widths, fields, message):
    with pytest.raises(FusekitError, match=message):
        Polyhistor(widths, PolyhistorConfig(**{"tasks": 2, "reduction": 4, **fields}))


def test_positions_and_tasks_that_are_not_there_are_refused(tmp_path):
    config = PolyhistorConfig(tasks=2, reduction=4)
    with pytest.raises(FusekitError, match="no module 'nope'"):
        attach_polyhistor(tiny_llama(), {"nope": 16}, config)
    with pytest.raises(FusekitError, match="task 2 of 2 tasks"):
        Polyhistor([8], config)(torch.zeros(1, 8), 0, 2)
    with pytest.raises(CheckpointError, match="not saved Polyhistor adapters"):
        load_polyhistor(tiny_llama(), tmp_path)


@pytest.fixture(params=["mos", "polyhistor"])
def saved(request, tmp_path):
    """A saved folder of either kind, its two files, and how it is loaded."""
    folder = tmp_path / "saved"
    if request.param == "mos":
        model = torch.nn.Sequential(torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)}))
        config = MosConfig(("q",), rank=2, equivalent_rank=2, private_rank=2)
        attach_mos(model, config)
        save_mos(model, config, folder)
        fresh = torch.nn.Sequential(torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)}))
        return folder, "mos_config.json", "mos.safetensors", lambda: load_mos(fresh, folder)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8)})
    config = PolyhistorConfig(tasks=1, task_size=2, layer_size=2, rank=1, reduction=2)
    save_polyhistor(attach_polyhistor(model, {"a": 8}, config), folder)
    names = ("polyhistor_config.json", "polyhistor.safetensors")
    return folder, *names, lambda: load_polyhistor(model, folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no facts", "not (a mixture of shards|saved Polyhistor adapters): "),
        ("no json", "not (a mixture of shards|saved Polyhistor adapters): "),
        ("a list", "format is .*, expected 'fusekit-"),
        ("another format", "format is 'other', expected 'fusekit-"),
        ("less facts", r"config\.json: is damaged: "),
        ("facts of another type", r"config\.json: is damaged: "),
        ("no weights", "cannot be read"),
        ("cut weights", "cannot be read"),
        ("other weights", "has no tensor|do not fit"),
    ],
)
def test_damaged_folders_are_refused_in_one_sentence(saved, damage, message):
    folder, facts_name, weights_name, load = saved
    facts, weights = folder / facts_name, folder / weights_name
    content = json.loads(facts.read_text())
    settings = content.get("config", content)
    if damage == "no facts":
        facts.unlink()
    elif damage == "no json":
        facts.write_text("{")
    elif damage == "a list":
        facts.write_text("[1]")
    elif damage == "another format":
        facts.write_text(json.dumps({**content, "format": "other"}))
    elif damage == "less facts":
        settings.pop("tasks" if "tasks" in settings else "rank")
        facts.write_text(json.dumps(content))
    elif damage == "facts of another type":
        settings["rank"] = "two"
        facts.write_text(json.dumps(content))
    elif damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-3])
    else:
        save_file({"x": np.zeros(1, "f4")}, weights)
    with pytest.raises(CheckpointError, match=message) as caught:
        load()
    assert "\n" not in str(caught.value)


def test_indices_beyond_the_pool_are_refused(tmp_path):
    model = torch.nn.Sequential(torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)}))
    config = MosConfig(("q",), rank=2, equivalent_rank=2, private_rank=2)
    attach_mos(model, config)
    save_mos(model, config, tmp_path / "saved")
    path = tmp_path / "saved" / "mos.safetensors"
    save_file({**load_file(path), "0.q.index_b": np.array([0, 7], "i4")}, path)
    fresh = torch.nn.Sequential(torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)}))
    with pytest.raises(CheckpointError, match=r"0\.q\.index_b has indices beyond 0 to 1"):
        load_mos(fresh, tmp_path / "saved")


def test_saving_does_not_replace_what_exists(saved):
    folder, *_, load = saved
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    loaded = load()
    with pytest.raises(FusekitError, match="already exists"):
        if isinstance(loaded, MosConfig):
            save_mos(torch.nn.Linear(2, 2), loaded, folder)
        else:
            save_polyhistor(loaded, folder)
    assert kept == {path.name: path.read_bytes() for path in folder.iterdir()}
