"""Meshes of ranks: every way to share out data, matrices, sequences and experts gives the steps of one process."""

import dataclasses

import pytest
import torch
from gloo import run_ranks
from torch.distributed.tensor import DTensor

from open_lm.data.batch import IGNORED, Batch
from open_lm.distributed import World
from open_lm.errors import ConfigError
from open_lm.generation import generate
from open_lm.mesh import MeshShape, parse_mesh, shape_for
from open_lm.model import random_weights
from open_lm.model.config import ModelConfig
from open_lm.precision import Precision
from open_lm.train.config import OptimizerConfig, ParallelConfig, mesh_shape
from open_lm.train.context_parallel import sequence_part
from open_lm.train.init_model import build_wrapped
from open_lm.train.optim import build_optimizers
from open_lm.train.row_order import RowOrder, row_orders, to_file_order
from open_lm.train.run_length import RunLength
from open_lm.train.state import TrainState
from open_lm.train.step import train_step
from open_lm.train.tasks import NextToken
from open_lm.train.timing import Timing

BASE = {"hidden_dim": 32, "n_layers": 2, "n_heads": 4, "seq_len": 16, "vocab_size": 32, "ffn_dim": 48}
EXPERTS = {"moe_freq": 2, "moe_num_experts": 4}
DROPLESS = {"moe_capacity_factor": 0.0, "moe_loss_weight": 0.0}  # the balance of a rank's tokens is not that of all
MODELS = {
    "dense": {},
    "shared keys, qk norm": {"n_kv_heads": 2, "qk_norm": True, "model_norm": "rms_norm"},
    "tied, qk norm": {"qk_norm": True, "weight_tying": True, "post_embed_norm": True},
    "by head, biases": {
        "positional_embedding_type": "head_rotary", "ffn_type": "gemma_geglu", "qk_norm": True,
        "model_norm": "gain_only_lp_layer_norm",
    },
    "gelu, window": {"ffn_type": "gelu", "sliding_window": 5},
    "experts": {**EXPERTS, **DROPLESS},
    "experts with a capacity": EXPERTS,
}  # fmt: skip
STEPS, BATCH = 20, 8
EXACT = 5e-7
"""Remaining difference with weights in fp64; loss and norms are computed in fp32 all the same."""
DOCUMENTS = torch.arange(16).expand(BATCH, 16) // 6


def batch(step, documents=False):
    generator = torch.Generator().manual_seed(step)
    whole = Batch.from_samples(torch.randint(0, 32, (BATCH, 17), generator=generator))
    targets = whole.targets_BT.clone()
    targets[0, 3:] = IGNORED
    targets[1] = IGNORED
    return Batch(whole.inputs_BT, targets, DOCUMENTS if documents else None)


def make_state(world, parallel, changes, optimizer="adamw", precision="fp32", dtype=None):
    config = ModelConfig(**{**BASE, **changes})
    numbers = Precision(precision, "cpu")
    numbers.weight_dtype = dtype or numbers.weight_dtype
    model = build_wrapped(config, world, parallel, 3, numbers.weight_dtype).train()
    experts = bool(config.moe_freq)
    precise = {"muon_ns_precision": "fp32"} if optimizer == "muon" else {}
    optimizers = build_optimizers(model, OptimizerConfig(optimizer=optimizer, eps=1e-5, **precise), 1e-2)
    if optimizer == "muon" and dtype is not None:
        optimizers[0]._dtype = dtype
    return TrainState(
        model=model,
        optimizers=optimizers,
        precision=numbers,
        lr_at=lambda step: 1e-2,
        run_length=RunLength((STEPS,), tokens_per_step=BATCH * 16),
        task=NextToken(1e-4, config.moe_loss_weight if experts else None, True, 4 if experts else 0),
        world=world,
        part=sequence_part(world),
    )


def trained(state, steps=STEPS, documents=False, accum=1):
    """The losses and norms of each step, and the weights after the last, whole and as files have them."""
    world, figures = state.world, []
    for step in range(steps):
        whole, size = batch(step, documents), BATCH // world.shape.n_data
        rows = next(part for k, part in enumerate(whole.split(BATCH // size)) if k == world.data_rank)
        rows = rows if state.part is None else rows.of_part(state.part)
        report = train_step(state, rows, accum=accum, clip=1.0, timing=Timing(world.device))
        figures.append([*world.sum(report.parts)[:3].tolist(), report.grad_norm.item()])
    orders, weights = row_orders(state.model), {}
    for name, tensor in state.model.state_dict().items():
        tensor = to_file_order(tensor, orders[name]) if name in orders else tensor
        weights[name] = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()
    return figures, weights


def _alone(world, folder, names, how):
    for name in names:
        torch.save(trained(make_state(World(), ParallelConfig(), MODELS[name]), **how), f"{folder}/{name}.pt")


def _together(world, folder, names, mesh, how):
    parallel = ParallelConfig(mesh=mesh)
    world = dataclasses.replace(world, mesh=mesh_shape(parallel, world.size))
    for name in names:
        expected, expected_weights = torch.load(f"{folder}/{name}.pt")
        figures, weights = trained(make_state(world, parallel, MODELS[name]), **how)
        for step, (one, other) in enumerate(zip(figures, expected, strict=True)):
            assert one == pytest.approx(other, abs=1e-5, rel=2e-5), (mesh, name, step)
        for key, expected_weight in expected_weights.items():
            worst = (weights[key] - expected_weight).abs().max().item()
            assert worst < 1e-5 + 1e-4 * expected_weight.abs().max().item(), (mesh, name, key, worst)


def assert_one_process_and_a_mesh_agree(tmp_path, mesh, ranks, names, **how):
    run_ranks(_alone, 1, str(tmp_path), names, how)
    run_ranks(_together, ranks, str(tmp_path), names, mesh, how)


@pytest.mark.parametrize(
    ("mesh", "names"),
    [
        ("tp=2", ["shared keys, qk norm", "tied, qk norm", "experts with a capacity"]),
        ("cp=2", ["shared keys, qk norm"]),
        ("ep=2", ["experts"]),
    ],
)
def test_two_ranks_take_the_steps_of_one(tmp_path, mesh, names):
    assert_one_process_and_a_mesh_agree(tmp_path, mesh, 2, names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "ranks", "names"),
    [
        ("tp=2", 2, list(MODELS)),
        ("cp=2", 2, list(MODELS)[:-1]),
        ("tp=4", 4, ["dense", "tied, qk norm", "by head, biases", "experts with a capacity"]),
        ("tp=2,fsdp=2", 4, list(MODELS)[:-1]),
        ("tp=2,dp=2", 4, ["dense", "experts"]),
        ("cp=2,fsdp=2", 4, list(MODELS)[:-1]),
        ("cp=2,dp=2", 4, ["dense", "experts"]),
        ("cp=4", 4, ["dense", "shared keys, qk norm", "gelu, window"]),
        ("cp=2,tp=2", 4, list(MODELS)[:-1]),
        ("ep=2,fsdp=2", 4, ["experts"]),
        ("ep=2,dp=2", 4, ["experts"]),
        ("ep=2,tp=2", 4, ["experts"]),
        ("ep=2,cp=2", 4, ["experts"]),
        ("ep=4", 4, ["experts"]),
        ("dp=2,fsdp=2,tp=2", 8, ["dense", "shared keys, qk norm", "experts"]),
        ("fsdp=2,cp=2,tp=2", 8, ["dense", "tied, qk norm", "experts"]),
        ("cp=2,ep=2,tp=2", 8, ["experts"]),
    ],
)
def test_more_ranks_and_pairs_of_axes_take_the_steps_of_one(tmp_path, mesh, ranks, names):
    assert_one_process_and_a_mesh_agree(tmp_path, mesh, ranks, names)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "ranks"), [("cp=2", 2), ("cp=2,tp=2", 4)])
def test_documents_stay_apart_when_ranks_share_out_the_sequence(tmp_path, mesh, ranks):
    names = ["dense", "gelu, window"]
    assert_one_process_and_a_mesh_agree(tmp_path, mesh, ranks, names, documents=True)


def _with_flags(world, folder, name, optimizer, how, flags):
    parallel = ParallelConfig(**flags)
    world = dataclasses.replace(world, mesh=mesh_shape(parallel, world.size))
    figures, weights = trained(make_state(world, parallel, MODELS[name], optimizer), **how)
    expected, expected_weights = torch.load(f"{folder}/alone.pt")
    for one, other in zip(figures, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5, rel=2e-5)
    for key, expected_weight in expected_weights.items():
        assert (weights[key] - expected_weight).abs().max() < 2e-5, key


def _exactly(world, folder, names, mesh, optimizer):
    """With weights in fp64 next to nothing is left of the differences of fp32."""
    parallel = ParallelConfig(mesh=mesh)
    world = dataclasses.replace(world, mesh=mesh_shape(parallel, world.size))
    for name in names:
        figures, weights = trained(make_state(world, parallel, MODELS[name], optimizer, dtype=torch.float64))
        if mesh == "dp=1":
            torch.save((figures, weights), f"{folder}/{name}.pt")
        expected, expected_weights = torch.load(f"{folder}/{name}.pt")
        for one, other in zip(figures, expected, strict=True):
            assert one == pytest.approx(other, abs=1e-6, rel=1e-6), (mesh, name)
        for key, expected_weight in expected_weights.items():
            assert (weights[key] - expected_weight).abs().max() < EXACT, (mesh, name, key)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "names", "optimizer"),
    [
        ("cp=4", ["shared keys, qk norm"], "adamw"),
        ("tp=2,fsdp=2", ["dense"], "muon"),
    ],
)
def test_nothing_but_rounding_sets_a_mesh_apart(tmp_path, mesh, names, optimizer):
    run_ranks(_exactly, 1, str(tmp_path), names, "dp=1", optimizer)
    run_ranks(_exactly, 4, str(tmp_path), names, mesh, optimizer)


def _alone_with(world, folder, name, optimizer, how):
    torch.save(trained(make_state(World(), ParallelConfig(), MODELS[name], optimizer), **how), f"{folder}/alone.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "name", "optimizer"),
    [
        ({"mesh": "tp=2", "grad_checkpointing": True}, "shared keys, qk norm", "adamw"),
        ({"mesh": "cp=2", "grad_checkpointing_mode": "selective"}, "dense", "adamw"),
        ({"mesh": "ep=2", "grad_checkpointing": True}, "experts", "adamw"),
        ({"mesh": "ep=2", "grad_checkpointing_mode": "selective"}, "experts", "adamw"),
        ({"mesh": "tp=2"}, "dense", "lion"),
        ({"mesh": "tp=2"}, "shared keys, qk norm", "muon"),
        ({"mesh": "tp=2", "torchcompile": True}, "shared keys, qk norm", "adamw"),
    ],
)
def test_recomputing_compiling_and_other_rules_change_nothing(tmp_path, flags, name, optimizer):
    how = {"steps": 6}
    run_ranks(_alone_with, 1, str(tmp_path), name, optimizer, how)
    run_ranks(_with_flags, 2, str(tmp_path), name, optimizer, how, flags)


@pytest.mark.slow
def test_accumulation_changes_nothing_under_a_mesh(tmp_path):
    assert_one_process_and_a_mesh_agree(tmp_path, "tp=2,fsdp=2", 4, ["shared keys, qk norm"], accum=2)


def _with_capacity(world, mesh):
    """Experts with a capacity route the tokens of each rank by themselves, as under fsdp."""
    figures = []
    for flags in (mesh, "fsdp=2"):
        parallel = ParallelConfig(mesh=flags)
        found = dataclasses.replace(world, mesh=mesh_shape(parallel, world.size))
        figures.append(trained(make_state(found, parallel, EXPERTS))[0])
    for one, other in zip(*figures, strict=True):
        assert one == pytest.approx(other, abs=1e-5, rel=1e-5)


@pytest.mark.slow
def test_experts_with_a_capacity_are_those_of_fsdp(tmp_path):
    run_ranks(_with_capacity, 2, "ep=2")


def _in_fp64(world):
    parallel = ParallelConfig(mesh="ep=2")
    world = dataclasses.replace(world, mesh=mesh_shape(parallel, world.size))
    with pytest.raises(ConfigError, match=r"torch\.float64 twice\. Use fp32 or bf16"):
        make_state(world, parallel, MODELS["experts"], dtype=torch.float64)
    world.gather(None)  # rank 0 holds what the others meet by


def test_experts_in_fp64_are_refused_where_torch_divides_their_gradients_twice():
    run_ranks(_in_fp64, 2)


def _in_bf16(world, mesh):
    parallel = ParallelConfig(mesh=mesh)
    world = dataclasses.replace(world, mesh=mesh_shape(parallel, world.size))
    figures, _ = trained(make_state(world, parallel, MODELS["shared keys, qk norm"], precision="amp_bf16"))
    assert figures[-1][0] < figures[0][0] - 0.05 and all(torch.tensor(figures).isfinite().flatten())


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tp=2", "cp=2"])
def test_it_learns_in_bf16(mesh):
    run_ranks(_in_bf16, 2, mesh)


def test_the_rows_of_packed_matrices_are_ordered_rank_by_rank_and_back():
    order = RowOrder((4, 2, 2), 2)
    rows = torch.arange(8)[:, None]
    assert order.in_memory(rows).flatten().tolist() == [0, 1, 4, 6, 2, 3, 5, 7]
    assert torch.equal(order.in_file(order.in_memory(rows)), rows)


@pytest.mark.parametrize(
    ("text", "ranks", "shape"),
    [
        ("fsdp=4,tp=2", 8, MeshShape(fsdp=4, tp=2)),
        ("tp=2", 8, MeshShape(dp=4, tp=2)),
        ("dp=2,fsdp=-1,tp=2", 16, MeshShape(dp=2, fsdp=4, tp=2)),
        ("dp:1,fsdp:-1,mp:2", 8, MeshShape(fsdp=4, tp=2)),
        ("!1,-1,2", 8, MeshShape(fsdp=4, tp=2)),
        ("1,2,2,2", 8, MeshShape(fsdp=2, tp=2, cp=2)),
    ],
)
def test_a_mesh_is_read_in_our_form_and_in_those_of_easylm(text, ranks, shape):
    assert shape_for(parse_mesh(text), ranks) == shape


@pytest.mark.parametrize(
    ("text", "ranks", "said"),
    [
        ("pp=2", 2, "'pp' is no axis"),
        ("tp=2,tp=2", 4, "'tp' is named twice"),
        ("tp=0", 2, "no number of ranks"),
        ("tp=two", 2, "no number of ranks"),
        ("dp=-1,tp=-1", 2, "only one axis"),
        ("dp=1,tp=4", 6, "do not fit the 6"),
        ("tp=4", 6, "do not fit the 6"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(text, ranks, said):
    with pytest.raises(ConfigError, match=said):
        shape_for(parse_mesh(text), ranks)


def test_shorthands_name_meshes():
    assert mesh_shape(ParallelConfig(), 4) == MeshShape(dp=4)
    assert mesh_shape(ParallelConfig(fsdp=True), 4) == MeshShape(fsdp=4)
    assert mesh_shape(ParallelConfig(fsdp=True, fsdp_hybrid=True, fsdp_group_size=2), 4) == MeshShape(dp=2, fsdp=2)
    assert mesh_shape(ParallelConfig(fsdp=True, mesh="tp=2"), 4) == MeshShape(fsdp=2, tp=2)
    with pytest.raises(ConfigError, match="--mesh"):
        ParallelConfig(fsdp=True, fsdp_hybrid=True, mesh="tp=2")


def test_ranks_know_which_of_them_hold_the_same_data():
    shape = MeshShape(dp=2, cp=2, ep=2, tp=2)
    assert [shape.data_rank(rank) for rank in range(16)] == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    assert [shape.share_rank(rank) for rank in range(16)] == [rank // 2 for rank in range(16)]
    assert shape.place(13) == {"dp": 1, "fsdp": 0, "cp": 1, "ep": 0, "tp": 1}


def _alone_as_large(world, folder, names):
    random_weights.LARGE, random_weights.CHUNK = 300, 64
    _alone(world, folder, names, {"steps": 0})


def _starts(world, mesh, names, folder):
    random_weights.LARGE, random_weights.CHUNK = 300, 64
    parallel = ParallelConfig(mesh=mesh, experimental_meta_device=True)
    world = dataclasses.replace(world, mesh=mesh_shape(parallel, world.size))
    for name in names:
        _, weights = trained(make_state(world, parallel, MODELS[name]), steps=0)
        for key, expected in torch.load(f"{folder}/{name}.pt")[1].items():
            assert torch.equal(weights[key], expected), (mesh, name, key)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "ranks"), [("tp=2", 2), ("tp=2,fsdp=2", 4), ("ep=2", 2), ("ep=2,tp=2", 4)])
def test_weights_made_part_by_part_are_those_of_one_process(tmp_path, mesh, ranks):
    names = ["experts"] if "ep" in mesh else ["shared keys, qk norm", "tied, qk norm", "by head, biases", "experts"]
    run_ranks(_alone_as_large, 1, str(tmp_path), names)
    run_ranks(_starts, ranks, mesh, names, str(tmp_path))


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]


def _writes(world, mesh, names, folder):
    parallel = ParallelConfig(mesh=mesh)
    world = dataclasses.replace(world, mesh=mesh_shape(parallel, world.size))
    for name in names:
        state = make_state(world, parallel, MODELS[name])
        texts = generate(state.model.eval(), PROMPTS, temperature=0, max_gen_len=8)
        assert texts == torch.load(f"{folder}/{name}.pt"), (mesh, name)


def _writes_alone(world, names, folder):
    for name in names:
        model = make_state(World(), ParallelConfig(), MODELS[name]).model
        torch.save(generate(model.eval(), PROMPTS, temperature=0, max_gen_len=8), f"{folder}/{name}.pt")


def test_divided_models_write_the_same_texts(tmp_path):
    names = ["shared keys, qk norm", "by head, biases", "experts"]
    run_ranks(_writes_alone, 1, names, str(tmp_path))
    run_ranks(_writes, 2, "tp=2", names, str(tmp_path))
    run_ranks(_writes, 2, "ep=2", ["experts"], str(tmp_path))
