"""A folder of transformers gives its tokenizer without any of its code being run, or a question being asked."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers

from open_lm.data.tokenizer import load_tokenizer


def test_code_beside_a_tokenizer_is_never_run(tmp_path):
    folder, canary = tmp_path / "model", tmp_path / "canary"
    folder.mkdir()
    made = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "one": 2, "two": 3}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    code = {"AutoConfig": "configuration_mine.MyConfig", "AutoModelForCausalLM": "modeling_mine.MyModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "never_heard_of", "auto_map": code}))
    (folder / "configuration_mine.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass MyConfig: ...\n")
    tokenizer = load_tokenizer(str(folder))
    assert list(tokenizer.encode("two one")) == [3, 2] and tokenizer.eot_id == 1
    assert not canary.exists()
