"""Float8 training: which layers multiply in 8 bits, how near that stays, and that checkpoints do not know of it."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from gloo import run_ranks
from runs import folder_of, metrics, run, weights, write_data
from torch import nn
from torch.distributed.tensor import DTensor

from open_lm.checkpoint.load_model import load_model
from open_lm.data.batch import Batch
from open_lm.errors import ConfigError
from open_lm.hf.export import ExportConfig, export
from open_lm.model import create_model
from open_lm.model.config import ModelConfig
from open_lm.train.config import ParallelConfig, mesh_shape
from open_lm.train.float8 import convert_to_float8
from open_lm.train.init_model import build_wrapped
from open_lm.train.parallel import blocks
from open_lm.train.tasks import NextToken

pytest.importorskip("torchao", reason="torchao is not installed: pip install '.[float8]'")
CPU = torch.device("cpu")
MODEL = {"hidden_dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "seq_len": 16, "vocab_size": 32, "ffn_dim": 96}


def converted(recipe="rowwise", **changes):
    torch.manual_seed(0)
    model = create_model(ModelConfig(**{**MODEL, **changes}))
    convert_to_float8(blocks(model), recipe, CPU)
    return model


def kinds(model):
    return {name: type(layer).__name__ for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def test_the_matrices_of_the_blocks_are_converted_and_nothing_else():
    found = kinds(converted())
    assert found.pop("output") == "Linear"
    assert len(found) == 8 and set(found.values()) == {"Float8Linear"}


def test_routers_and_widths_that_do_not_fit_stay_as_they_are():
    found = kinds(converted(moe_freq=2, moe_num_experts=16))
    assert found["layers.0.feed_forward.router"] == "Linear" or found["layers.1.feed_forward.router"] == "Linear"
    assert kinds(converted(ffn_dim=100))["layers.0.feed_forward.w3"] == "Linear"
    with pytest.raises(ConfigError, match="divide by 16"):
        converted(hidden_dim=36, ffn_dim=50, n_heads=2, n_kv_heads=2)


def rounded(x, dims):
    """`x` rounded to float8 with the largest number of each group over `dims` as 448, in fp64."""
    scale = 448 / x.abs().amax(dims, keepdim=True).double()
    if dims == -1:
        scale = torch.exp2(scale.log2().floor())  # rowwise: powers of two
    return (x * scale).float().to(torch.float8_e4m3fn).double() / scale


@pytest.mark.parametrize(("recipe", "dims"), [("rowwise", -1), ("tensorwise", (0, 1))])
def test_a_product_is_that_of_numbers_rounded_by_hand(recipe, dims):
    layer, x = converted(recipe).layers[0].attention.out_proj, torch.randn(32, 64).bfloat16()
    expected = rounded(x, dims) @ rounded(layer.weight.detach(), dims).T
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x).double()
    assert ((found - expected).norm() / expected.norm()).item() < 5e-3  # the sum is rounded to bf16
    plain = x.double() @ layer.weight.detach().double().T
    assert ((expected - plain).norm() / plain.norm()).item() > 2e-2


@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise"])
def test_gradients_point_where_those_of_plain_products_do(recipe):
    ids = torch.randint(0, 32, (4, 16), generator=torch.Generator().manual_seed(1))
    model, gradients = converted(recipe), []
    plain = create_model(ModelConfig(**MODEL))
    plain.load_state_dict(model.state_dict())  # the same keys and shapes
    for one in (plain, model):
        with torch.autocast("cpu", torch.bfloat16):
            logits = one(ids)[0]
        nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in one.parameters()]))
    assert 0.95 < torch.cosine_similarity(*gradients, dim=0) < 0.99999


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run in float8, stopped and resumed, beside one in bf16."""
    folder = tmp_path_factory.mktemp("float8")
    manifest = write_data(folder / "data", (100, 100), vocab=32)
    (folder / "model.json").write_text(json.dumps(MODEL))
    common = ["--model", str(folder / "model.json"), "--precision", "amp_bf16", "--num-checkpoints", "2"]
    for name, extra in (
        ("plain", []),
        ("rowwise", ["--float8", "rowwise"]),
        ("tensorwise", ["--float8", "tensorwise"]),
    ):
        run(folder, manifest, *common, *extra, name=name, steps=24)
    return folder, manifest, common


@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise"])
def test_a_run_learns_as_one_in_bf16(trained, recipe):
    folder, *_ = trained
    losses, plain = (list(metrics(folder, name).values()) for name in (recipe, "plain"))
    assert losses != plain and losses[-1] < losses[0] - 0.5
    assert losses[-1] == pytest.approx(plain[-1], abs=0.05)


def test_a_checkpoint_holds_plain_weights_and_the_run_goes_on_to_the_bit(trained):
    folder, manifest, common = trained
    expected = weights(folder, "rowwise", "2")
    assert all(type(value) is torch.Tensor and value.dtype == torch.float32 for value in expected.values())
    assert expected.keys() == weights(folder, "plain", "2").keys()
    for old in (folder_of(folder, "rowwise") / "checkpoints").glob("*_2*"):
        old.unlink()
    run(folder, manifest, *common, "--float8", "rowwise", "--resume", "latest", name="rowwise", steps=24)
    for name, value in weights(folder, "rowwise", "2").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
def test_the_weights_load_without_torchao_and_export(trained, tmp_path, monkeypatch):
    folder, *_ = trained
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    path = folder_of(folder, "rowwise") / "checkpoints" / "epoch_2.pt"
    model = load_model(str(path))
    assert set(kinds(model).values()) == {"Linear"}
    assert export(ExportConfig(str(path), str(tmp_path / "hf"), tokenizer="none")) < 1e-4


def test_without_torchao_the_message_names_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ConfigError, match=r"pip install 'torchao>="):
        converted()


def test_a_precision_that_is_not_bf16_is_refused():
    with pytest.raises(ConfigError, match="--precision amp_bf16"):
        ParallelConfig(float8="rowwise", precision="fp32")


def _on_ranks(world, mesh, folder):
    parallel = ParallelConfig(mesh=mesh, float8="rowwise", precision="amp_bf16")
    world = replace(world, mesh=mesh_shape(parallel, world.size))
    model = build_wrapped(ModelConfig(**MODEL), world, parallel, 3, torch.float32)
    batch = Batch.from_samples(torch.arange(68).view(4, 17) % 32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = NextToken().loss_sums(model.train(), batch).total
    loss.backward()
    norms = {n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in model.named_parameters()}
    norms = {name.removeprefix("module."): grad.norm() for name, grad in norms.items() if grad is not None}
    if world.rank == 0:
        torch.save((loss.item(), norms), f"{folder}/{mesh}.pt")


def _narrow(world):
    parallel = ParallelConfig(mesh="tp=2", float8="rowwise", precision="amp_bf16")
    world = replace(world, mesh=mesh_shape(parallel, world.size))
    block = build_wrapped(ModelConfig(**{**MODEL, "ffn_dim": 80}), world, parallel, 3, torch.float32).layers[0]
    layers = {"w3": block.feed_forward.w3, "out_proj": block.attention.out_proj}
    multiplies = {name: type(layer.product).__name__ == "DividedProduct" for name, layer in layers.items()}
    assert multiplies == {"w3": False, "out_proj": True}  # 80 divides by 16, half of it does not


def test_what_counts_is_the_width_of_a_rank():
    run_ranks(_narrow, 2)


def test_divided_and_sharded_layers_multiply_in_float8_too(tmp_path):
    run_ranks(_on_ranks, 1, "dp=1", str(tmp_path))
    expected, norms = torch.load(tmp_path / "dp=1.pt")
    for mesh in ("fsdp=2", "tp=2"):
        run_ranks(_on_ranks, 2, mesh, str(tmp_path))
        loss, found = torch.load(tmp_path / f"{mesh}.pt")
        assert loss == pytest.approx(expected, rel=2e-2)
        assert found.keys() == norms.keys()
        for name, norm in found.items():
            assert norm.item() == pytest.approx(norms[name].item(), rel=0.1), (mesh, name)
