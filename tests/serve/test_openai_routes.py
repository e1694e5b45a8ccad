"""OpenAI's routes: what is served is what `generate` writes and a forward pass scores, streamed or whole."""

import json

import pytest
import torch
from serve_setup import httpx, running, tokenizer_of_bytes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from open_lm.data import tokenizer as data_tokenizer
from open_lm.generation import generate
from open_lm.generation.text import TokenScore
from open_lm.serve.openai_format import completion_logprobs
from open_lm.serve.token_texts import TokenTexts

PROMPT = "the quick brown fox"


def complete(client, **body):
    answer = client.post("/v1/completions", json={"prompt": PROMPT, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(client, path="/v1/completions", **body):
    """The chunks of a streamed answer."""
    with client.stream("POST", path, json={"stream": True, **body}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def written(first, prompt=PROMPT, **settings):
    model, tokenizer = first
    (tokens,) = generate(model, [tokenizer.encode(prompt)], stop_ids=[0], **{"top_p": 1.0, **settings})
    return tokenizer.decode(tokens)


def test_served_greedy_text_is_that_of_generate(client, first):
    found = complete(client, max_tokens=30, temperature=0)
    assert found["choices"][0]["text"] == written(first, max_gen_len=30, temperature=0)
    assert found["usage"]["prompt_tokens"] == len(PROMPT)
    assert found["usage"]["completion_tokens"] == 30 and found["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1.0}, {"temperature": 1.3, "top_p": 0.9}, {"temperature": 0.8, "min_p": 0.1, "top_k": 9}],
)
def test_drawn_text_is_that_of_generate_with_the_same_seed(client, first, settings):
    found = complete(client, max_tokens=30, seed=11, **settings)
    assert found["choices"][0]["text"] == written(first, max_gen_len=30, seed=11, **settings)


def test_without_a_seed_texts_differ(client):
    texts = {complete(client, max_tokens=20, temperature=1.5)["choices"][0]["text"] for _ in range(4)}
    assert len(texts) == 4


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"temperature": 1.0, "seed": 3, "n": 3}, {"stop": ["e", "qu"]}]
)
@pytest.mark.parametrize("echo", [False, True])
def test_the_pieces_of_a_stream_join_to_the_whole(client, settings, echo):
    body = {"max_tokens": 40, "seed": 5, "logprobs": 2, **settings, "echo": echo}
    whole = complete(client, **body)["choices"]
    chunks = streamed(client, prompt=PROMPT, **body)
    for choice in whole:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]
        for name, value in choice["logprobs"].items():
            pieces = [one for c in mine if c["logprobs"] for one in c["logprobs"][name]]
            if name == "token_logprobs":
                assert pieces[1:] == pytest.approx(value[1:], abs=1e-4) and (pieces[0] is None) == echo
            elif name != "top_logprobs":
                assert pieces == value


def test_log_probabilities_are_those_of_a_forward_pass(client, first):
    model, tokenizer = first
    found = complete(client, max_tokens=12, temperature=0, logprobs=3, echo=True)["choices"][0]["logprobs"]
    ids = tokenizer.encode(PROMPT) + generate(model, [tokenizer.encode(PROMPT)], temperature=0, max_gen_len=12)[0]
    expected = model(torch.tensor([ids]))[0][0].double().log_softmax(-1)
    assert [t for t in found["tokens"] if not t.startswith("bytes:")] == [
        t for i in ids if (t := tokenizer.decode([i])) != "\ufffd"
    ]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    for place, token in enumerate(ids[1:]):
        assert found["token_logprobs"][place + 1] == pytest.approx(expected[place, token].item(), abs=1e-4)
        best = expected[place].topk(3)
        top = found["top_logprobs"][place + 1]
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_texts_offsets_are_where_its_tokens_stand_in_it(client, folder):
    found = complete(client, prompt="oné", max_tokens=12, temperature=0, logprobs=0, echo=True)["choices"][0]
    places = zip(found["logprobs"]["tokens"], found["logprobs"]["text_offset"], strict=True)
    plain = [(token, place) for token, place in places if not token.startswith("bytes:")]
    assert len(plain) > 8 and all(found["text"][place : place + len(token)] == token for token, place in plain)


def test_a_token_that_the_tokenizer_puts_before_a_prompt_takes_no_place_in_the_text(folder, tmp_path):
    backend = tokenizer_of_bytes()
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    with running(folder, tokenizer=str(tmp_path / "tokenizer.json")) as (url, _):
        body = {"prompt": "abc", "max_tokens": 2, "temperature": 0, "logprobs": 0, "echo": True}
        found = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]
    assert found["logprobs"]["tokens"][:4] == ["<|endoftext|>", "a", "b", "c"]
    assert found["logprobs"]["text_offset"][:5] == [0, 0, 1, 2, 3]


def test_tokens_of_llamas_kind_keep_their_spaces_and_bytes():
    words = ["<s>", "</s>", "▁", "a", "b", "▁a", "▁b", "<0xC3>", "<0xA9>"]
    backend = Tokenizer(models.BPE({w: n for n, w in enumerate(words)}, [("▁", "a"), ("▁", "b")], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    texts = TokenTexts(data_tokenizer.Tokenizer(backend, "llama"))
    assert [texts.of(words.index(word))[0] for word in ("▁a", "a", "▁b")] == [" a", "a", " b"]
    assert texts.of(7) == ("bytes:\\xc3", [0xC3]) and texts.n_characters([5, 7, 8]) == 3


def test_of_likeliest_tokens_with_one_text_the_likeliest_is_told():
    class Texts:
        def of(self, token):
            return ("same" if token < 3 else "other"), None

        def n_characters(self, tokens):
            return 4 * len(tokens)

    score = TokenScore(2, -2.0, False, ((1, -1.0), (3, -1.5), (0, -1.7)))
    found = completion_logprobs([(2, score)], Texts())
    assert found["top_logprobs"] == [{"same": -1.0, "other": -1.5}] and found["token_logprobs"] == [-2.0]


def test_equal_prompts_of_a_request_are_drawn_as_generate_draws_them(client, first):
    model, tokenizer = first
    ids = tokenizer.encode(PROMPT)
    expected = generate(model, [ids] * 4, stop_ids=[0], top_p=1.0, temperature=1.0, seed=7, max_gen_len=20)
    for body in ({"prompt": [PROMPT] * 4}, {"prompt": [PROMPT] * 2, "n": 2}, {"n": 4}):
        found = complete(client, max_tokens=20, seed=7, **body)["choices"]
        assert [c["text"] for c in found] == [tokenizer.decode(tokens) for tokens in expected]
    assert len({c["text"] for c in found}) == 4


def test_null_is_as_if_a_field_were_left_out(client):
    nothing = dict.fromkeys(["n", "stop", "temperature", "top_p", "logprobs", "echo", "stream", "max_tokens", "user"])
    assert len(complete(client, **nothing)["choices"]) == 1


def test_max_tokens_0_scores_a_prompt_as_long_as_the_context(client):
    found = complete(client, prompt=[1] * 257, max_tokens=0, logprobs=0, echo=True)
    assert len(found["choices"][0]["logprobs"]["token_logprobs"]) == 257
    assert found["usage"]["completion_tokens"] == 0


def test_several_prompts_and_several_texts_of_each_come_in_order(client, first):
    prompts = ["one", "two", "three"]
    answer = complete(client, prompt=prompts, n=2, temperature=0, max_tokens=5)
    usage, found = answer["usage"], answer["choices"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len("onetwothree"), 30)  # a prompt counts once
    assert [c["index"] for c in found] == list(range(6))
    assert [c["text"] for c in found] == [
        written(first, p, temperature=0, max_gen_len=5) for p in prompts for _ in "ab"
    ]


def test_a_stop_string_ends_the_text_and_is_left_out(client):
    free = complete(client, max_tokens=40, temperature=0)["choices"][0]["text"]
    stop = free[7:10]
    found = complete(client, max_tokens=40, temperature=0, stop=stop)["choices"][0]
    assert found["text"] == free[: free.find(stop)]
    assert found["finish_reason"] == "stop"


def test_token_ids_are_a_prompt_like_their_text(client, first):
    ids = first[1].encode(PROMPT)
    for prompt in (ids, [ids]):
        assert complete(client, prompt=prompt, temperature=0)["choices"] == complete(client, temperature=0)["choices"]


def chat(client, **body):
    answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hello"}], **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_answer_follows_the_chat_template(client, first):
    found = chat(client, temperature=0, max_tokens=12, logprobs=True, top_logprobs=2)["choices"][0]
    assert found["message"]["content"] == written(
        first, "<|user|>\nhello\n<|assistant|>\n", temperature=0, max_gen_len=12
    )
    entries = found["logprobs"]["content"]
    assert len(entries) == 12 and all(len(entry["top_logprobs"]) == 2 for entry in entries)


def test_a_streamed_answer_begins_with_its_role_and_ends_with_the_counts(client):
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "max_tokens": 9, "seed": 1}
    whole = client.post("/v1/chat/completions", json=body).json()
    chunks = streamed(client, "/v1/chat/completions", **body, stream_options={"include_usage": True})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]]
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]


def test_each_model_answers_under_its_name(client):
    names = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert [name.rpartition("-")[2] for name in names] == ["first", "second"]
    texts = {complete(client, model=name, temperature=0)["choices"][0]["text"] for name in names}
    assert len(texts) == 2
    assert client.get(f"/v1/models/{names[1]}").json()["id"] == names[1]
    missing = client.post("/v1/completions", json={"prompt": "x", "model": "third"})
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"
