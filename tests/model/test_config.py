"""Architectures by name, by file and by flag, and the errors for those that cannot be."""

import json
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_lm.errors import ConfigError
from open_lm.model.config import ALIASES, ModelConfig, ModelFlags, model_names, resolve_architecture

TINY = {"hidden_dim": 16, "n_layers": 2, "n_heads": 2, "seq_len": 16, "vocab_size": 16}

TABLE = """
open_lm_test_tiny 16 2 2 16 16 | open_lm_11m 96 12 12 2048 50432 | quark_neox 96 12 12 2048 50432
open_lm_11m_v2 96 8 4 2048 50432 | open_lm_25m 192 12 12 2048 50432 | atom_neox 192 12 12 2048 50432
open_lm_41m 288 12 12 2048 50432 | open_lm_79m_v2 512 8 4 2048 50432 | open_lm_87m 488 12 12 2048 50432
aphid_neox 488 12 12 2048 50432 | open_lm_154m_v2 576 24 8 2048 50432 | open_lm_160m 768 12 12 2048 50432
ant_neox 768 12 12 2048 50432 | open_lm_410m 1024 24 16 2048 50432 | open_lm_411m 1024 24 16 2048 50432
potato_neox 1024 24 16 2048 50432 | open_lm_411m_v2 1024 24 8 2048 50432 | open_lm_830m 1536 24 16 2048 50432
marmot_neox 1536 24 16 2048 50432 | open_lm_1b 2048 24 16 2048 50432 | m1b_neox 2048 24 16 2048 50432
m1b_tiktoken 2048 24 16 2048 50304 | open_lm_1b_old 2048 24 16 2048 50432 | open_lm_3b 2560 32 32 2048 50432
g3b_neox 2560 32 32 2048 50432 | open_lm_7b 4096 32 32 2048 50432 | l7b_neox 4096 32 32 2048 50432
llama2_7b 4096 32 32 4096 32000
"""
ROWS = [cell.split() for cell in re.split(r"[|\n]", TABLE) if cell.strip()]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_registered_names_mean_what_openlm_means_by_them(row):
    config = resolve_architecture(ModelFlags(model=row[0]))
    sizes = (config.hidden_dim, config.n_layers, config.n_heads, config.seq_len, config.vocab_size)
    assert sizes == tuple(map(int, row[1:]))


def test_every_registered_name_is_in_the_table():
    mambas = {"mamba_130m": (768, 12), "mamba_1b": (2048, 36), "mamba_7b": (4096, 64)}
    assert {*model_names(), *ALIASES} == {row[0] for row in ROWS} | set(mambas)
    for name, sizes in mambas.items():
        config = resolve_architecture(ModelFlags(model=name, qk_norm=True))
        assert (config.d_model, config.n_layer, config.vocab_size, config.seq_len) == (*sizes, 50432, 2048)
        assert ModelConfig.from_dict(config.to_dict()) == config


def test_a_key_of_the_json_wins_over_the_flag():
    config = resolve_architecture(
        ModelFlags(model="open_lm_1b_old", positional_embedding_type="rotary", qk_norm=True, ffn_type="gelu")
    )
    assert (config.positional_embedding_type, config.qk_norm, config.ffn_type) == ("head_rotary", False, "swiglu")
    assert resolve_architecture(ModelFlags(model="open_lm_1b", qk_norm=True)).qk_norm


def test_heads_that_do_not_divide_the_width_round_down():
    assert resolve_architecture(ModelFlags(model="open_lm_87m")).head_dim == 40


def test_a_config_comes_back_from_its_dict():
    config = resolve_architecture(ModelFlags(model="llama2_7b"))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_model_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"--model open_lm_160: no such model. Near: open_lm_160m"):
        resolve_architecture(ModelFlags(model="open_lm_160"))
    with pytest.raises(ConfigError, match="no such file"):
        resolve_architecture(ModelFlags(model=str(tmp_path / "missing.json")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[1]", "holds a list"),
        (json.dumps({"hidden_dim": 16}), "missing n_layers, n_heads, seq_len, vocab_size"),
        (json.dumps({**TINY, "hiden_dim": 3}), "unknown key 'hiden_dim': did you mean hidden_dim"),
        (json.dumps({**TINY, "n_layers": 0}), "n_layers: found 0"),
        (json.dumps({**TINY, "n_layers": True}), "n_layers: found True"),
        (json.dumps({**TINY, "n_layers": "2"}), "n_layers: found '2'"),
        (json.dumps({**TINY, "qk_norm": "yes"}), "qk_norm: found 'yes'"),
        (
            json.dumps({**TINY, "model_norm": "batch_norm"}),
            "model_norm: found 'batch_norm', choose one of default_layer",
        ),
        (json.dumps({**TINY, "n_heads": 32}), "32 n_heads do not fit hidden_dim 16"),
        (json.dumps({**TINY, "n_heads": 5}), "makes heads 3 wide"),
        (json.dumps({**TINY, "n_heads": 4, "n_kv_heads": 3}), "n_kv_heads: 3 does not divide"),
        (json.dumps({**TINY, "norm_eps": 0}), "norm_eps: found 0"),
        (json.dumps({**TINY, "rotary_base": "1e4"}), "rotary_base: found '1e4'"),
        (json.dumps({**TINY, "attn_name": "custom_attn"}), "needs --attn-activation"),
        (json.dumps({"d_model": 8, "n_layer": 1, "seq_len": 4}), "missing vocab_size"),
        (json.dumps({"d_model": 8, "n_layer": 0, "seq_len": 4, "vocab_size": 9}), "n_layer: found 0"),
        (json.dumps({**TINY, "d_model": 8}), "unknown key 'hidden_dim'"),
        (json.dumps({**TINY, "attn_activation": "relu"}), "needs --attn-name custom_attn"),
        (
            json.dumps({**TINY, "attn_name": "custom_attn", "attn_activation": "relu", "attn_seq_scalar": "max"}),
            "--attn-seq-scalar max needs its exponent",
        ),
    ],
)
def test_a_json_that_cannot_be_is_refused_with_the_reason(tmp_path, text, message):
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        resolve_architecture(ModelFlags(model=str(path)))
    assert str(path) in str(caught.value)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*TINY, "n_kv_heads", "qk_norm", "model_norm", "norm_eps"]), st.one_of(
    st.integers(-3, 40), st.booleans(), st.none(), st.text(max_size=3), st.floats(), st.lists(st.integers(), max_size=1)
)))  # fmt: skip
def test_any_values_make_a_config_or_a_config_error(values):
    try:
        config = ModelConfig.from_dict({**TINY, **values})
    except ConfigError:
        return
    assert config.head_dim >= 1 and config.n_heads % config.kv_heads == 0


def test_the_flags_need_no_torch():
    code = "import sys, open_lm.model.config; assert not {'torch', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
