"""The evaluation command over ranks, the weights whole on each or shared out, gives the numbers of one process."""

import importlib.util
import json
import math
import os
import socket

import pytest
import torch
from icl_setup import SAMPLES, tiny_model, write_checkpoint, write_tokenizer

from open_lm.errors import CheckpointError, ConfigError
from open_lm.evaluate.command import evaluate
from open_lm.evaluate.flags import EvalConfig
from open_lm.model.config import ModelFlags

TASKS = {"python_words": "language_modeling", "python_choices": "multiple_choice", "python_imports": "schema",
         "short_answers": "generation_task_with_answers"}  # fmt: skip
MODELS = {
    "llama": {},
    "tied": {"weight_tying": True, "n_kv_heads": 1, "qk_norm": True, "model_norm": "gain_only_lp_layer_norm"},
    "experts": {"moe_freq": 2, "moe_num_experts": 4},
    "scaled": {
        "attn_name": "custom_attn",
        "attn_activation": "relu",
        "attn_seq_scalar": "max",
        "attn_seq_scalar_alpha": 1.0,
    },
}
HARNESS = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{{question}}}}}"
{answers}
metric_list: [{{metric: {metric}}}]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    tokenizer = write_tokenizer(folder / "tokenizer.json")
    tasks = [
        {"label": name, "dataset_uri": str(SAMPLES / f"{name}.jsonl"), "icl_task_type": kind, "num_fewshot": [1]}
        for name, kind in TASKS.items()
    ]
    (folder / "tasks.yaml").write_text(json.dumps({"icl_tasks": tasks}))
    for name, changes in MODELS.items():
        write_checkpoint(folder / f"{name}.pt", tiny_model(3, **changes), tokenizer)
    return folder


def command(work, folder, out, ranks, **settings):
    """`work` once in this process, or by `ranks` processes."""
    if ranks == 1:
        work(0, 1, 0, folder, out, settings)
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = (ranks, port, folder, out, settings)
        torch.multiprocessing.start_processes(work, arguments, nprocs=ranks, start_method="fork")
    content = json.loads((out / "results.json").read_text())
    values = {}
    for run in content["runs"]:
        for r in run["records"]:
            # A perplexity is the exponential of a mean loss: an untrained model's last bits stand in the sixth digit.
            value = math.log(r["value"]) if "perplexity" in r["metric"] else r["value"]
            values[run["name"], r["key"], r["metric"]] = value
    return values, {run["weights"] for run in content["runs"]}


def _join(rank, size, port):
    torch.set_num_threads(1)
    if size > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TOKENIZERS_PARALLELISM": "false"}


def _native(rank, size, port, folder, out, settings):
    _join(rank, size, port)
    hf = settings.pop("hf_model", None)
    paths = () if hf else tuple(str(folder / f"{name}.pt") for name in MODELS)
    config = EvalConfig(eval_yaml=str(folder / "tasks.yaml"), checkpoint=paths, output_dir=str(out), device="cpu",
                        tokenizer=str(folder / "tokenizer.json"), **settings)  # fmt: skip
    evaluate(config, ModelFlags(hf_model=hf, hf_seq_len=128) if hf else ModelFlags())


@pytest.fixture(scope="module")
def alone(files, tmp_path_factory):
    return command(_native, files, tmp_path_factory.mktemp("alone"), 1)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_ranks_give_the_numbers_and_the_fingerprints_of_one(files, alone, tmp_path, fsdp):
    assert command(_native, files, tmp_path, 2, fsdp=fsdp) == alone
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert len(lines) == len(MODELS) * len(TASKS)  # one a task: only rank 0 writes


@pytest.mark.slow
def test_three_ranks_among_which_nothing_divides_evenly_give_them_too(files, alone, tmp_path):
    assert command(_native, files, tmp_path, 3, fsdp=True) == alone


@pytest.mark.slow
def test_a_model_of_transformers_is_shared_out_too(files, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=400, max_position_embeddings=128, **shape)).save_pretrained(tmp_path / "hf")
    whole = command(_native, files, tmp_path / "one", 1, hf_model=str(tmp_path / "hf"))
    assert command(_native, files, tmp_path / "two", 2, hf_model=str(tmp_path / "hf"), fsdp=True) == whole


def _share(rank, size, port, folder, out, settings):
    _join(rank, size, port)
    from torch.distributed.tensor import DTensor

    from open_lm.checkpoint.resolve import resolve
    from open_lm.distributed import start_world
    from open_lm.evaluate.sharded_model import load_sharded

    with start_world("cpu") as world:
        model = load_sharded(resolve(str(folder / "llama.pt")), world, torch.bfloat16)
        held = dict(model.named_parameters())
        assert all(isinstance(p, DTensor) and p.dtype == torch.bfloat16 for p in held.values())
        share = sum(p.to_local().numel() for p in held.values()) / sum(p.numel() for p in held.values())
        with pytest.raises(CheckpointError, match="of another model: weight_tying True"):  # on both ranks
            load_sharded(resolve(str(folder / "tied.pt")), world, None, weight_tying=False)
    (out / f"{rank}.json").write_text(json.dumps(share))


@pytest.mark.slow
def test_each_rank_holds_its_share_of_the_weights(files, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_share, (2, port, files, tmp_path, {}), nprocs=2, start_method="fork")
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [0.5, 0.5]


def _harness(rank, size, port, folder, out, settings):
    _join(rank, size, port)
    config = EvalConfig(engine="lm-eval", tasks=("choices", "words", "writing"), task_path=str(out.parent / "tasks"),
                        checkpoint=tuple(str(folder / f"{name}.pt") for name in ("llama", "tied")), device="cpu",
                        output_dir=str(out), **settings)  # fmt: skip
    evaluate(config, ModelFlags())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_the_harness_over_ranks_gives_the_numbers_of_one(files, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tasks").mkdir()
    choices = "doc_to_choice: '{{choices}}'\ndoc_to_target: gold"
    for name, file, kind, question, answers, metric in (
        ("choices", "python_choices", "multiple_choice", "query", choices, "acc"),
        ("words", "python_words", "loglikelihood", "context", "doc_to_target: ' {{continuation}}'", "perplexity"),
        ("writing", "short_answers", "generate_until", "context",
         "doc_to_target: '{{answer}}'\ngeneration_kwargs: {until: [e], max_gen_toks: 6}", "exact_match"),
    ):  # fmt: skip
        text = HARNESS.format(name=name, path=SAMPLES / f"{file}.jsonl", kind=kind, question=question, answers=answers,
                              metric=metric)  # fmt: skip
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text)
    whole, weights = command(_harness, files, tmp_path / "one", 1)
    assert len(whole) >= 6 and len(weights) == 2
    for fsdp in (False, True):
        values, again = command(_harness, files, tmp_path / f"two {fsdp}", 2, fsdp=fsdp)
        assert again == weights and values == pytest.approx(whole, rel=1e-6)


def test_llm_foundry_holds_whole_models_only():
    with pytest.raises(ConfigError, match="--fsdp: not with --engine llm-foundry"):
        EvalConfig(eval_yaml="x", engine="llm-foundry", fsdp=True)
