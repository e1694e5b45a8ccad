"""Any checkpoint becomes a model: OpenLM's own, every prefix, every wrapping; what does not fit is refused by name."""

import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from shared import SHARED, needs_shared

import open_lm
from open_lm.errors import CheckpointError, ConfigError
from open_lm.model import create_model
from open_lm.model.config import ModelConfig
from open_lm.weights.file import clean_state_dict, load_file

CONFIG = ModelConfig(hidden_dim=16, n_layers=2, n_heads=2, seq_len=12, vocab_size=19)
FIXTURES = SHARED / "fixtures" / "openlm_checkpoints"
NAMES = ["gain_only_qknorm", "gelu_lp", "head_rotary", "llama_rotary_rms", "rotary_layernorm"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model(CONFIG)


def save(path, model, *, prefix="", wrap=True, config=CONFIG, **more):
    weights = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    about = {"epoch": 1, "step": 3, **({"config": {"model": config.to_dict()}} if config else {}), **more}
    torch.save({**about, "state_dict": weights} if wrap else weights, path)
    return str(path)


def same(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@needs_shared
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_checkpoints_of_openlm_give_its_logits_with_and_without_cache(name):
    expected = torch.load(FIXTURES / f"{name}.logits.pt")
    words = iter(expected["flags"])
    flags = {w[2:].replace("-", "_"): True if w == "--qk-norm" else next(words) for w in words}
    model = open_lm.load_model(FIXTURES / f"{name}.pt", model=str(FIXTURES / f"{name}.json"), **flags)
    ids = expected["input_ids"]
    assert torch.allclose(model(ids)[0], expected["logits"], atol=1e-4)
    past = model(ids[:, :40], use_cache=True)[2]
    assert torch.allclose(model(ids[:, 40:41], past)[0], expected["kv_logits_at_40"], atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("wrap", [True, False])
def test_every_prefix_and_wrapping_loads(model, tmp_path, prefix, wrap):
    path = save(tmp_path / "epoch_1.pt", model, prefix=prefix, wrap=wrap)
    (tmp_path / "m.json").write_text(json.dumps(CONFIG.to_dict()))
    named = {} if wrap else {"model": str(tmp_path / "m.json")}
    assert same(open_lm.load_model(path, **named), model)


def test_a_prefix_inside_a_name_is_removed():
    tensor = torch.zeros(2, 2)
    assert list(clean_state_dict({"layers.0._orig_mod._checkpoint_wrapped_module.w": tensor})) == ["layers.0.w"]


def test_a_safetensors_file_loads_like_the_others(model, tmp_path):
    from safetensors.torch import save_file

    save_file(model.state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "m.json").write_text(json.dumps(CONFIG.to_dict()))
    assert same(open_lm.load_model(tmp_path / "w.safetensors", model=str(tmp_path / "m.json")), model)


def test_the_model_keeps_no_hold_on_the_file(model, tmp_path):
    path = save(tmp_path / "epoch_1.pt", model)
    loaded = open_lm.load_model(path)
    with open(path, "r+b") as file:
        file.write(bytes(os.path.getsize(path)))
    assert same(loaded, model)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_is_that_of_every_weight(model, tmp_path, dtype):
    loaded = open_lm.load_model(save(tmp_path / "e.pt", model), dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.output.weight, model.output.weight.bfloat16())


def test_an_unknown_dtype_is_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="dtype 'float99'"):
        open_lm.load_model(save(tmp_path / "e.pt", model), dtype="float99")


@pytest.mark.parametrize("dropped", ["tok_embeddings.weight", "output.weight", None])
def test_tied_weights_stay_tied_under_whichever_name_the_file_has(tmp_path, dropped):
    config = ModelConfig(**{**CONFIG.to_dict(), "weight_tying": True})
    weights = create_model(config).state_dict()
    weights.pop(dropped, None)
    torch.save({"state_dict": weights, "config": {"model": config.to_dict()}}, tmp_path / "e.pt")
    loaded = open_lm.load_model(tmp_path / "e.pt")
    assert loaded.tok_embeddings.weight is loaded.output.weight
    assert torch.equal(loaded.output.weight, next(w for n, w in weights.items() if w.shape == (19, 16)))


@pytest.mark.parametrize("architecture", [
    {"d_model": 16, "n_layer": 2, "vocab_size": 19, "seq_len": 12},
    {**CONFIG.to_dict(), "moe_freq": 2, "moe_num_experts": 4},
])  # fmt: skip
def test_experts_and_state_space_models_load_and_write(tmp_path, architecture):
    torch.manual_seed(0)
    made = create_model(ModelConfig.from_dict(architecture)).eval()
    torch.save({"state_dict": made.state_dict(), "config": {"model": made.config.to_dict()}}, tmp_path / "e.pt")
    loaded = open_lm.load_model(tmp_path / "e.pt")
    assert same(loaded, made)
    prompts = [[1, 2, 3], [4, 5, 6]]
    assert open_lm.generate(loaded, prompts, temperature=0, max_gen_len=5) == open_lm.generate(
        loaded, prompts, temperature=0, max_gen_len=5, use_cache=False
    )


def test_a_file_without_rotary_frequencies_loads_with_fresh_ones(model, tmp_path):
    weights = {name: w for name, w in model.state_dict().items() if "inv_freq" not in name}
    torch.save({"state_dict": weights, "config": {"model": CONFIG.to_dict()}}, tmp_path / "e.pt")
    assert same(open_lm.load_model(tmp_path / "e.pt"), model)


def test_another_rotary_with_the_same_weights_is_refused_by_name(model, tmp_path):
    path = save(tmp_path / "e.pt", model)
    with pytest.raises(CheckpointError, match=r"positional_embedding_type 'rotary' .asked 'head_rotary'"):
        open_lm.load_model(path, positional_embedding_type="head_rotary")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"hidden_dim": 32}, r"tok_embeddings.weight is \(19, 16\), the model's \(19, 32\)"),
        ({"n_layers": 3}, "layers.2.attention.in_proj.weight is missing"),
        ({"n_layers": 1}, "layers.1.attention.in_proj.weight is left over"),
        ({"ffn_type": "gelu"}, "feed_forward.0.weight is missing"),
    ],
)
def test_weights_of_another_shape_are_refused_by_name(model, tmp_path, change, found):
    path = save(tmp_path / "e.pt", model, config=None)
    (tmp_path / "m.json").write_text(json.dumps({**CONFIG.to_dict(), **change}))
    with pytest.raises(CheckpointError, match=found):
        open_lm.load_model(path, model=str(tmp_path / "m.json"))


def test_without_an_architecture_the_model_is_asked_for(model, tmp_path):
    with pytest.raises(CheckpointError, match="give --model"):
        open_lm.load_model(save(tmp_path / "e.pt", model, config=None))


def test_numpy_scalars_of_old_files_are_data(model, tmp_path):
    more = {"lr": np.float64(0.25), "n": np.int64(3), "flag": np.bool_(True), "f": np.float32(0.5)}
    path = save(tmp_path / "e.pt", model, **more)
    assert {name: load_file(path)[name] for name in more} == more
    torch.save(more, tmp_path / "old.pt", pickle_protocol=2)
    assert load_file(str(tmp_path / "old.pt")) == more


def test_numpy_scalars_under_the_name_of_numpy_1_load(tmp_path):
    torch.save({"lr": np.float64(0.25)}, tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert load_file(str(tmp_path / "old.pt")) == {"lr": 0.25}


class Touch:
    """A pickle that would make a file when read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_file_is_refused_unrun_and_a_way_to_convert_is_named(model, tmp_path, is_zip):
    content = {"state_dict": model.state_dict(), "extra": Touch(tmp_path / "touched")}
    torch.save(content, tmp_path / "e.pt", _use_new_zipfile_serialization=is_zip)
    (tmp_path / "touched").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"(?s)io.open.*weights_only=False"):
        load_file(str(tmp_path / "e.pt"))
    assert not (tmp_path / "touched").exists()


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data/0", bytes(10_000_000))
    with pytest.raises(CheckpointError, match="compressed"):
        load_file(str(tmp_path / "bomb.pt"))


def test_an_archive_that_claims_more_than_it_has_is_refused(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        info = archive.infolist()[0]
        info.file_size = 1 << 40
    (tmp_path / "e.pt").write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match="more bytes than the file has"):
        load_file(str(tmp_path / "e.pt"))


def test_members_that_leave_the_archive_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "e.pt", "w") as archive:
        archive.writestr("../../evil", b"x")
    with pytest.raises(CheckpointError, match="a path outside itself"):
        load_file(str(tmp_path / "e.pt"))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(100)])
def test_damaged_files_are_named(tmp_path, content):
    (tmp_path / "epoch_2.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"epoch_2.pt: damaged"):
        load_file(str(tmp_path / "epoch_2.pt"))


def test_a_truncated_checkpoint_is_named(model, tmp_path):
    path = save(tmp_path / "epoch_2.pt", model)
    content = (tmp_path / "epoch_2.pt").read_bytes()
    (tmp_path / "epoch_2.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"epoch_2.pt: damaged"):
        load_file(path)


def test_missing_files_and_empty_runs_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing.pt: no such"):
        open_lm.load_model(tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        open_lm.load_model(tmp_path)


def test_a_dict_without_weights_is_refused(tmp_path):
    torch.save({"epoch": 1, "optimizer": {"state": {}}}, tmp_path / "optimizer_1.pt")
    with pytest.raises(CheckpointError, match="no weights"):
        clean_state_dict(load_file(str(tmp_path / "optimizer_1.pt")))


def test_a_file_that_states_no_positional_embedding_says_which_is_assumed(model, tmp_path, caplog):
    path = save(tmp_path / "epoch_1.pt", model, config=None)
    architecture = tmp_path / "arch.json"
    sizes = {"hidden_dim": 16, "n_layers": 2, "n_heads": 2, "seq_len": 12, "vocab_size": 19}
    architecture.write_text(json.dumps(sizes))
    open_lm.load_model(path, model=str(architecture), positional_embedding_type="head_rotary")
    assert not caplog.text
    open_lm.load_model(path, model=str(architecture))
    assert "rotary is assumed" in caplog.text and "head_rotary" in caplog.text
