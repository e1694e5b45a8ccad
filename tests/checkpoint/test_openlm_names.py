"""Experts laid out by MegaBlocks compute here what MegaBlocks computes, and names go back to OpenLM's."""

import pytest
import torch
from shared import SHARED, needs_shared

import open_lm
from open_lm.errors import CheckpointError, ConfigError
from open_lm.model import create_model
from open_lm.model.config import ModelConfig, ModelFlags
from open_lm.model.moe import MixtureOfExperts
from open_lm.weights.file import from_openlm, load_file, to_openlm

E, D, F, K = 4, 16, 24, 2
BASE = {"hidden_dim": D, "n_layers": 2, "n_heads": 2, "seq_len": 12, "vocab_size": 19}
EXPERTS = {"moe_freq": 2, "moe_num_experts": E, "moe_top_k": K, "moe_capacity_factor": 0.0}


def megablocks(kind):
    """A layer's weights as MegaBlocks' `MoE`, its dropless `dMoE`, or the gated dMoE has them."""
    torch.manual_seed(0)
    shapes = {"moe": {"w1": (E, D, F), "w2": (E, F, D)}, "dmoe": {"w1": (E * F, D), "w2": (E * F, D)}}
    shapes["glu"] = {**shapes["dmoe"], "v1": (E * F, D)}
    weights = {f"experts.mlp.{name}": torch.randn(shape) * 0.3 for name, shape in shapes[kind].items()}
    return {"router.layer.weight": torch.randn(E, D), "experts.bias": torch.zeros(D), **weights}


def computed_as_megablocks(kind, weights, x_ND):
    """Token by token, in fp64, by its documented products: x w1, tanh gelu, w2; dropless x w1', and w2 as it lies."""
    w = {name.split(".")[-1]: tensor.double() for name, tensor in weights.items() if "mlp" in name}
    gelu = lambda h: 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))  # noqa: E731
    out = torch.zeros_like(x_ND, dtype=torch.float64)
    for n, x in enumerate(x_ND.double()):
        probs = (weights["router.layer.weight"].double() @ x).softmax(-1)
        for e in probs.argsort(descending=True)[:K].tolist():
            rows = slice(e * F, (e + 1) * F)
            if kind == "moe":
                hidden, last = gelu(x @ w["w1"][e]), w["w2"][e]
            else:
                hidden, last = w["w1"][rows] @ x, w["w2"][rows]
                hidden = torch.nn.functional.silu(hidden) * (w["v1"][rows] @ x) if kind == "glu" else gelu(hidden)
            out[n] += probs[e] * (hidden @ last)
    return out


@pytest.mark.parametrize("kind", ["moe", "dmoe", "glu"])
def test_a_layer_computes_what_megablocks_computes(kind):
    weights = megablocks(kind)
    named = {f"layers.0.feed_forward.{name}": tensor for name, tensor in weights.items()}
    ours = {name.removeprefix("layers.0.feed_forward."): t for name, t in from_openlm(named).items()}
    config = ModelConfig(**BASE, **EXPERTS, ffn_dim=F, moe_expert_type="ffn" if kind == "glu" else "megablocks")
    layer = MixtureOfExperts(config, 0)
    layer.load_state_dict(ours)
    x_ND = torch.randn(9, D)
    found = layer(x_ND[None])[0][0]
    torch.testing.assert_close(found.double(), computed_as_megablocks(kind, weights, x_ND), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", [{"ffn_type": "gelu"}, {**EXPERTS, "moe_expert_type": "megablocks"}])
def test_names_and_layout_go_to_openlm_and_back(changes):
    weights = create_model(ModelConfig(**BASE, **changes)).state_dict()
    there = to_openlm(weights)
    assert set(there) != set(weights)
    back = from_openlm(there)
    assert set(back) == set(weights) and all(torch.equal(back[name], weights[name]) for name in weights)


@needs_shared
def test_our_gelu_layers_get_every_name_that_openlm_gave_its_own():
    theirs = load_file(str(SHARED / "fixtures/openlm_checkpoints/gelu_lp.pt"))["state_dict"]
    expected = {name.removeprefix("module."): tensor for name, tensor in theirs.items()}
    written = to_openlm(from_openlm(expected))
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


@pytest.fixture
def file(tmp_path):
    """A checkpoint of OpenLM with experts, which says nothing of its architecture, and our model with its weights."""
    torch.manual_seed(1)
    model = create_model(ModelConfig(**BASE, **EXPERTS, moe_expert_type="megablocks")).eval()
    state = {f"module.{name}": tensor for name, tensor in to_openlm(model.state_dict()).items()}
    torch.save({"epoch": 1, "name": "r", "state_dict": state, "step": 3}, tmp_path / "epoch_1.pt")
    (tmp_path / "m.json").write_text(str({**BASE}).replace("'", '"'))
    return tmp_path, model


def test_a_checkpoint_of_openlm_with_experts_loads_as_what_it_is(file):
    folder, model = file
    flags = {name: value for name, value in EXPERTS.items() if name != "moe_capacity_factor"}
    loaded = open_lm.load_model(folder / "epoch_1.pt", model=str(folder / "m.json"), **flags)
    assert loaded.config.moe_expert_type == "megablocks"
    ids = torch.randint(0, 19, (2, 12))
    assert torch.equal(loaded(ids)[0], model(ids)[0])


def test_a_bias_that_was_trained_is_named():
    weights = {f"layers.0.feed_forward.{name}": tensor for name, tensor in megablocks("moe").items()}
    weights["layers.0.feed_forward.experts.bias"][3] = 1.0
    with pytest.raises(CheckpointError, match=r"layers.0.feed_forward.experts.bias is not zero"):
        from_openlm(weights)


def test_half_an_expert_is_named():
    weights = {f"layers.0.feed_forward.{name}": tensor for name, tensor in megablocks("moe").items()}
    del weights["layers.0.feed_forward.experts.mlp.w2"]
    with pytest.raises(CheckpointError, match="w1 or w2 is missing"):
        from_openlm(weights)


def test_the_flag_names_the_same_experts():
    flags = {"model": "open_lm_test_tiny", "moe_freq": 1, "moe_num_experts": 2, "moe_expert_type": "megablocks"}
    assert create_model(ModelFlags(**flags)).layers[0].feed_forward.experts.w12.shape == (2, 64, 16)


def test_the_command_writes_a_file_with_openlms_names_and_its_flags(tmp_path, capsys):
    from open_lm.utils.to_openlm import main

    config = ModelConfig(**BASE, ffn_type="gelu", qk_norm=True)
    model = create_model(config).eval()
    torch.save({"state_dict": model.state_dict(), "config": {"model": config.to_dict()}, "step": 5}, tmp_path / "a.pt")
    main(["--checkpoint", str(tmp_path / "a.pt"), "--out", str(tmp_path / "b.pt")])
    assert "--ffn-type gelu --positional-embedding-type rotary --qk-norm" in capsys.readouterr().out
    written = load_file(str(tmp_path / "b.pt"))
    assert written["step"] == 5 and "layers.1._ff_w2.weight" in written["state_dict"]
    (tmp_path / "m.json").write_text(str(BASE).replace("'", '"'))
    loaded = open_lm.load_model(tmp_path / "b.pt", model=str(tmp_path / "m.json"), ffn_type="gelu", qk_norm=True)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("changes", [{"n_kv_heads": 1}, {**EXPERTS}, {"ffn_dim": 8}])
def test_the_command_names_what_openlm_does_not_have(tmp_path, changes):
    from open_lm.utils.to_openlm import main

    config = ModelConfig(**BASE, **changes)
    model = create_model(config)
    torch.save({"state_dict": model.state_dict(), "config": {"model": config.to_dict()}}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="OpenLM has no "):
        main(["--checkpoint", str(tmp_path / "a.pt"), "--out", str(tmp_path / "b.pt")])
    assert not (tmp_path / "b.pt").exists()


@pytest.mark.parametrize("changes", [{"ffn_type": "gelu", "weight_tying": True, "post_embed_norm": True},
                                     {**EXPERTS, "moe_expert_type": "megablocks"}])  # fmt: skip
def test_moments_numbered_as_openlm_numbers_them_find_their_weights(changes):
    """OpenLM's optimizer numbers what its `named_parameters()` lists: here as the file lists them, the norm first."""
    from open_lm.checkpoint.state_dicts import by_name

    torch.manual_seed(0)
    model = create_model(ModelConfig(**BASE, **changes))
    for parameter in model.parameters():  # moments that tell whose they are
        parameter.data.normal_()
    there = to_openlm(model.state_dict())
    stored = dict(sorted(there.items(), key=lambda item: "post_embed" not in item[0]))
    twice = ("feed_forward.0.weight", "feed_forward.2.weight", ".inv_freq", "_ff_w1", "_ff_w2")
    gelu = [name for name in stored if not name.endswith(twice[:3])] if "ffn_type" in changes else None
    listed = gelu or [name for name in stored if not name.endswith(twice)]
    listed = [name for name in listed if not (changes.get("weight_tying") and name == "output.weight")]
    order = sorted(listed, key=lambda name: list(stored).index(name))
    state = {k: {"step": torch.tensor(3.0), "exp_avg": stored[name] * 2} for k, name in enumerate(order)}
    saved = {"state": state, "param_groups": [{"params": []}, {"params": list(range(len(order)))}]}
    found = by_name(saved, model, stored)["state"]
    expected = dict(model.named_parameters())
    assert set(found) == set(expected)
    for name, parameter in expected.items():
        assert torch.equal(found[name]["exp_avg"], parameter.data * 2) and found[name]["step"] == 3


def test_moments_of_another_model_are_named():
    from open_lm.checkpoint.state_dicts import by_name

    model = create_model(ModelConfig(**BASE))
    names = [name for name, _ in model.named_parameters()]
    state = {k: {"exp_avg": torch.zeros(3, 5)} for k in range(len(names))}
    saved = {"state": state, "param_groups": [{"params": list(range(len(names)))}]}
    with pytest.raises(CheckpointError, match=r"\(3, 5\).* for tok_embeddings.weight"):
        by_name(saved, model, names)
    with pytest.raises(CheckpointError, match=r"holds 1 parameters, the model has"):
        by_name({"state": {0: {}}, "param_groups": [{"params": [0]}]}, model, names)
