"""EasyLM's routes: log-likelihoods of a forward pass, greedy texts of `generate`, lm-eval's windows."""

import pytest
import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from serve_setup import httpx, running

from open_lm.errors import ConfigError
from open_lm.generation import generate
from open_lm.serve.easylm_routes import rolling_windows
from open_lm.serve.refused import Refused
from open_lm.serve.service import Service


def post(client, path, **body):
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def log_likelihood(model, before, after):
    logits = model(torch.tensor([[*before, *after]]))[0][0, len(before) - 1 : -1].double()
    own = logits.log_softmax(-1).gather(1, torch.tensor(after)[:, None])
    return own.sum().item(), logits.argmax(-1).tolist() == after


def test_the_log_likelihood_of_texts_is_that_of_a_forward_pass(client, first):
    model, tokenizer = first
    prefixes, texts = ["the quick brown", "the quick brown", "", "x"], [" fox", " dog jumps", "hello", ""]
    greedy = tokenizer.decode(generate(model, [tokenizer.encode("the")], temperature=0, max_gen_len=4)[0])
    prefixes, texts = [*prefixes, "the"], [*texts, greedy]
    found = post(client, "/loglikelihood", prefix_text=prefixes, text=texts)
    assert (found["prefix_text"], found["text"]) == (prefixes, texts)
    for i, (prefix, text) in enumerate(zip(prefixes, texts, strict=True)):
        expected = (
            log_likelihood(model, tokenizer.encode(prefix) or [0], tokenizer.encode(text)) if text else (0.0, True)
        )
        assert found["log_likelihood"][i] == pytest.approx(expected[0], abs=1e-4)
        assert found["is_greedy"][i] == expected[1]


def test_long_prefixes_lose_their_beginning(client, first):
    model, tokenizer = first
    prefix, text = "abcdefgh" * 50, " end"
    found = post(client, "/loglikelihood", prefix_text=[prefix], text=[text])
    ids = tokenizer.encode(prefix)[-(257 - 4) :]
    expected = log_likelihood(model, ids, tokenizer.encode(text))[0]
    assert found["log_likelihood"] == [pytest.approx(expected, abs=1e-3)]


@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 32, 33, 100])
def test_windows_of_a_long_text_are_those_of_lm_eval(n):
    ids = list(range(1, n + 1))
    theirs = [make_disjoint_window(pair) for pair in get_rolling_token_windows(ids, 0, 16, 1)]
    assert rolling_windows(ids, [0], 17) == [(list(a), list(b)) for a, b in theirs]


def test_the_log_likelihood_of_a_whole_text_covers_each_token_once(client, first):
    model, tokenizer = first
    short, long = "a short text", "long " * 120
    found = post(client, "/loglikelihood-rolling", text=[short, long, ""])
    assert found["log_likelihood"][0] == pytest.approx(log_likelihood(model, [0], tokenizer.encode(short))[0], abs=1e-3)
    parts = rolling_windows(tokenizer.encode(long), [0], 256)
    assert found["log_likelihood"][1] == pytest.approx(sum(log_likelihood(model, *p)[0] for p in parts), abs=1e-2)
    assert found["log_likelihood"][2] == 0


def test_greedy_until_stops_each_text_at_its_own_strings(client, first):
    model, tokenizer = first
    free = [
        tokenizer.decode(generate(model, [tokenizer.encode(p)], temperature=0, max_gen_len=1000, stop_ids=[0])[0])
        for p in ("one", "two")
    ]
    until = [free[0][5:8], [free[1][9:11], "never there"]]
    found = post(client, "/greedy-until", prefix_text=["one", "two"], until=until)
    assert found["output_text"] == [free[0][: free[0].find(until[0])], free[1][: free[1].find(until[1][0])]]


def test_generate_writes_to_the_end_of_the_context(client):
    found = post(client, "/generate", prefix_text=["one", "two"], temperature=0)
    assert len(found["output_text"]) == 2 and found["temperature"] == 0


def test_a_chat_goes_on_with_its_context(client):
    first_turn = post(client, "/chat", prompt="hello", temperature=0)
    assert first_turn["context"].startswith(f"<|user|>\nhello\n<|assistant|>\n{first_turn['response']}<|endoftext|>")
    refused = client.post("/chat", json={"prompt": "and now?", "context": first_turn["context"]})
    assert refused.status_code == 400  # the answer has filled the context of this tiny model
    assert post(client, "/chat", prompt="and?", context="<|user|>\nhi\n", temperature=0)["context"].startswith(
        "<|user|>\nhi\n<|user|>"
    )


def test_more_texts_than_slots_and_queue_hold_are_written_in_turns(folder, monkeypatch):
    """Whether there is room or not: a request that has begun waits for it."""
    asked = [
        ("/loglikelihood-rolling", {"text": ["long " * 250, "short", "x" * 300]}),
        ("/loglikelihood", {"text": [f"text {n}" for n in range(7)]}),
        ("/greedy-until", {"prefix_text": [f"text {n}" for n in range(7)], "until": ["e"] * 7}),
    ]
    submit, attempts, is_full = Service.submit, [], False

    def refusing(self, tickets):
        attempts.append(len(tickets))
        if is_full or (len(attempts) > 1 and len(attempts) % 3 == 2):
            raise Refused(429, "The server is busy.")
        submit(self, tickets)

    def answers(url):
        found = []
        for path, body in asked:
            attempts.clear()
            found.append(post(client, url + path, **body))
            assert all(n == 1 for n in attempts)
        return found

    with running(folder, slots=2, max_queue=1) as (narrow, _), running(folder) as (wide, _), httpx.Client() as client:
        client.timeout = 60
        expected = answers(wide)
        monkeypatch.setattr(Service, "submit", refusing)
        assert answers(narrow) == expected
        assert len(attempts) > 7  # some had to ask again
        is_full = True
        refused = client.post(narrow + "/loglikelihood", json={"text": ["a"]})
    assert refused.status_code == 429  # one that has not begun is told to come back


def test_a_slot_that_becomes_free_is_used_at_once(folder, monkeypatch):
    """One long text beside many short ones: the short ones do not wait for it."""
    ended = []
    count = Service._count
    monkeypatch.setattr(Service, "_count", lambda self, t, f: (ended.append(len(t.text.tokens)), count(self, t, f)))
    prefixes = ["a", *[" ".join("x" * 120) + f" {n}" for n in range(5)]]
    with running(folder, slots=2, max_queue=0) as (url, _), httpx.Client(timeout=60) as client:
        texts = post(client, url + "/greedy-until", prefix_text=prefixes, until=[["\x00"]] * 6)["output_text"]
    assert len(texts) == 6 and ended[-1] == max(ended) and ended.index(max(ended)) == 5


def test_equal_prefixes_get_texts_of_their_own(client):
    texts = post(client, "/generate", prefix_text=["one"] * 4)["output_text"]
    assert len(set(texts)) == 4


def test_a_conversation_that_the_template_does_not_take_is_refused(folder, tmp_path):
    (tmp_path / "odd.jinja").write_text("{{ raise_exception('no jokes') if 'joke' in messages[0]['content'] }}hi")
    with running(folder, chat_template=str(tmp_path / "odd.jinja")) as (url, _):
        assert httpx.post(f"{url}/chat", json={"prompt": "hello"}, timeout=60).status_code == 200
        answer = httpx.post(f"{url}/chat", json={"prompt": "a joke"})
    assert answer.status_code == 400 and "no jokes" in answer.json()["error"]["message"]


def test_a_template_that_is_no_jinja_is_an_error_at_the_start(folder, tmp_path):
    (tmp_path / "broken.jinja").write_text("{% for %}")
    with (
        pytest.raises(ConfigError, match=r"--chat-template: line 1 is no jinja"),
        running(folder, chat_template=str(tmp_path / "broken.jinja")),
    ):
        pass


def test_ready_says_so(client):
    assert client.get("/ready").text == "Ready!\n"


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/loglikelihood", {"text": []}, "text"),
        ("/loglikelihood", {"prefix_text": ["a"], "text": ["b", "c"]}, "prefix_text"),
        ("/loglikelihood", {"text": ["x" * 300]}, "text"),
        ("/generate", {}, "prefix_text"),
        ("/greedy-until", {"prefix_text": ["a"]}, "until"),
        ("/greedy-until", {"prefix_text": ["a"], "until": ["b", "c"]}, "until"),
        ("/greedy-until", {"prefix_text": ["a"], "until": [""]}, "until"),
        ("/chat", {}, "prompt"),
    ],
)
def test_bodies_that_lack_something_name_it(client, path, body, field):
    answer = client.post(path, json=body)
    assert answer.status_code == 400
    assert field in answer.json()["error"]["message"]
