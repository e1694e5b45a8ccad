"""Python in README and docs: every block runs as it stands, on tiny models in the places that it names."""

import json
import re

import icl_setup
import published_folder
import torch
from runs import ROOT

from open_lm.distributed import World

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = {
    (page.name, number): block
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
}


def run(key, replaced, **names):
    """Run a block that sees `names`, some of its strings `replaced`; returns all names that are defined after it."""
    block = BLOCKS[key]
    for said, real in replaced.items():
        assert said in block, f"{key}: {said} is no longer there"
        block = block.replace(said, str(real))
    exec(compile(block, str(key), "exec"), names)
    return names


def test_every_block_has_a_test_here():
    elsewhere = {("serving.md", 0)}  # tests/serve/test_real_clients.py
    assert set(BLOCKS) == {("evaluation.md", 0), ("weights.md", 0), ("weights.md", 1)} | elsewhere


def test_scores_from_python(tmp_path):
    tokenizer, world = icl_setup.tiny_tokenizer(tmp_path), World()
    names = {"model": icl_setup.tiny_model(), "tokenizer": tokenizer, "world": world}
    scores = run(("evaluation.md", 0), {"eval/yamls/light.yaml": "quickstart"}, **names)["scores"]
    assert len(scores) == 5 and all(0 <= value <= 1 for value in scores.values())


def test_a_published_model_writes(tmp_path, capsys):
    folder, _, _ = published_folder.make(tmp_path / "published", nested=True)
    run(("weights.md", 0), {"apple/DCLM-7B": folder, "50": "5"})
    assert capsys.readouterr().out.startswith("Machine learning is")


def test_models_load_by_every_kind_of_name(tmp_path):
    model, alone = icl_setup.tiny_model(), tmp_path / "alone"
    alone.mkdir()
    written = icl_setup.write_checkpoint(alone / "epoch_1.pt", model)
    folder, _, _ = published_folder.make(tmp_path / "published")
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    named = {
        "logs/my-run": alone, "old/epoch_5.pt": tmp_path / "bare.pt", "epoch_5.pt": written,
        'model="open_lm_1b", model_norm="gain_only_lp_layer_norm", qk_norm=True':
            f"model={written_json(tmp_path, model)!r}",
        "exported/": folder, "hf://apple/DCLM-7B": folder, "hf://owner/name@revision": folder,
    }  # fmt: skip
    names = run(("weights.md", 1), named, ids=torch.tensor([[1, 2, 3]]))
    assert names["logits"].shape == (1, 3, published_folder.PARAMS["vocab_size"])


def written_json(folder, model):
    path = folder / "model.json"
    path.write_text(json.dumps(model.config.to_dict()))
    return str(path)
