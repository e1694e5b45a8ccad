"""Clients that others wrote work unchanged: the `openai` package and `lm_eval --model local-completions`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from icl_setup import task_of, write_rows
from serve_setup import running, tokenizer_of_bytes

from open_lm.generation import generate

openai = pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")

ROOT = Path(__file__).resolve().parents[2]
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


@pytest.fixture
def theirs(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0)


def test_openais_client_lists_completes_and_streams(theirs, first):
    model, tokenizer = first
    name = theirs.models.list().data[0].id
    assert theirs.models.retrieve(name).id == name
    whole = theirs.completions.create(model=name, prompt="hello", max_tokens=9, temperature=0, logprobs=2, echo=True)
    (tokens,) = generate(model, [tokenizer.encode("hello")], temperature=0, max_gen_len=9)
    assert whole.choices[0].text == "hello" + tokenizer.decode(tokens)
    assert whole.choices[0].logprobs.token_logprobs[0] is None
    stream = theirs.completions.create(model=name, prompt="hello", max_tokens=9, temperature=0, stream=True)
    assert "hello" + "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_the_python_of_the_docs_page_runs(server, theirs, capsys):
    name = theirs.models.list().data[0].id
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.S)
    for said, real in {"http://127.0.0.1:8000": server[0], "my_run": name, "max_tokens=50": "max_tokens=5"}.items():
        assert said in block
        block = block.replace(said, real)
    exec(compile(block, "docs/serving.md", "exec"), {})
    assert capsys.readouterr().out


def test_openais_client_chats(theirs):
    name = theirs.models.list().data[0].id
    settings = {"model": name, "messages": MESSAGES, "max_tokens": 9, "seed": 5, "n": 2}
    whole = theirs.chat.completions.create(**settings, logprobs=True, top_logprobs=3)
    texts = ["", ""]
    stream = theirs.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
        usage = chunk.usage
    assert texts == [choice.message.content for choice in whole.choices]
    assert usage == whole.usage and usage.completion_tokens == 18
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 3


def test_openais_client_raises_its_own_errors(theirs, folder):
    with pytest.raises(openai.NotFoundError, match="No model"):
        theirs.completions.create(model="gpt-5", prompt="hello")
    with pytest.raises(openai.BadRequestError, match="context"):
        theirs.completions.create(model=theirs.models.list().data[0].id, prompt="x" * 300)
    with running(folder, api_key="secret") as (url, _), pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()


TASKS = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: {kind}
target_delimiter: ""
{fields}
"""
WORDS = (
    'doc_to_text: "{{context}}"\ndoc_to_target: "{{continuation}}"\nmetric_list: [{metric: acc}, {metric: perplexity}]'
)
CHOICES = 'doc_to_text: "{{query}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\nmetric_list: [{metric: acc}]'


@pytest.fixture
def tasks(tmp_path, first):
    """Two tasks for lm-eval and for us: rows whose continuation greedy decoding writes, or not; and choices."""
    model, tokenizer = first
    contexts = [f"row {number} says" for number in range(24)]
    texts = generate(model, [tokenizer.encode(context) for context in contexts], temperature=0, max_gen_len=3)
    words = [
        {"context": context, "continuation": text if number % 3 and text == text.strip() else "xyz"}
        for number, (context, text) in enumerate(zip(contexts, map(tokenizer.decode, texts), strict=True))
    ]
    choices = [{"query": f"number {n} is", "choices": [f"{n}{c}" for c in "abcd"], "gold": n % 4} for n in range(30)]
    found = {}
    for name, rows, kind, fields in (
        ("words", words, "loglikelihood", WORDS),
        ("choices", choices, "multiple_choice", CHOICES),
    ):
        path = write_rows(tmp_path / f"{name}.jsonl", rows)
        (tmp_path / f"{name}.yaml").write_text(TASKS.format(name=name, rows=path, kind=kind, fields=fields))
        found[name] = path
    return tmp_path, found


@pytest.mark.slow
def test_lm_evals_scores_through_the_server_are_those_of_our_engine(server, first, tasks):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    pytest.importorskip("tenacity", reason="lm-eval's API models need pip install lm_eval[api]")
    from transformers import PreTrainedTokenizerFast

    from open_lm.distributed import World
    from open_lm.evaluate.engine.icl import evaluate_icl

    folder, paths = tasks
    PreTrainedTokenizerFast(tokenizer_object=tokenizer_of_bytes(), eos_token="<|endoftext|>").save_pretrained(
        folder / "t"
    )
    name = next(iter(server[1].models))
    arguments = f"model={name},base_url={server[0]}/v1/completions,tokenizer={folder}/t,num_concurrent=4,max_length=255"
    command = [
        sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments,
        "--tasks", "words,choices", "--include_path", folder, "--output_path", folder / "out", "--log_samples",
        "--batch_size", "3",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OPENAI_API_KEY": "none",
        "HF_DATASETS_CACHE": str(folder / "c"),
    }
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (report,) = (folder / "out").rglob("results_*.json")
    theirs = json.loads(report.read_text())["results"]
    model, tokenizer = first
    ours = evaluate_icl(
        model,
        tokenizer,
        [
            task_of(paths["words"], "language_modeling", label="words", continuation_delimiter=""),
            task_of(paths["choices"], "multiple_choice", label="choices", continuation_delimiter=""),
        ],
        world=World(),
        max_seq_len=256,
    )
    scores = {key.split("/")[0]: value for key, value in ours.items()}
    assert theirs["words"]["acc,none"] == pytest.approx(scores["words"]) and 0.2 < scores["words"] < 0.9
    assert theirs["choices"]["acc,none"] == pytest.approx(scores["choices"])
