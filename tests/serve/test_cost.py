"""The cost of a request: faults, texts, log-probabilities and memory are bounded before they are paid for."""

import threading
import time

import pytest
from serve_setup import httpx, n_open, running, until


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [1.5] * 200_000}),
        ("/v1/completions", {"prompt": ["a", *[1] * 200_000]}),
        ("/v1/completions", {"prompt": [[]] * 200_000}),
        ("/v1/completions", {"prompt": "x", "metadata": dict.fromkeys(map(str, range(200_000)))}),
        ("/v1/chat/completions", {"messages": [5] * 200_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{}] * 200_000}]}),
        ("/loglikelihood", {"text": [5] * 200_000}),
        ("/greedy-until", {"prefix_text": ["a"], "until": [[5]] * 200_000}),
    ],
)
def test_a_body_with_a_million_faults_costs_no_more_than_one_with_one(client, path, body):
    """Each fault used to be listed: half a minute and several GB."""
    begun = time.process_time()  # of the server, too: it is in this process
    answer = client.post(path, json=body)
    assert answer.status_code == 400 and time.process_time() - begun < 5


def test_long_requests_are_encoded_beside_the_event_loop_whatever_they_consist_of(client, server, monkeypatch):
    served = server[1].first
    encode, threads = served.encode, []

    def noted(text, **settings):
        threads.append(threading.current_thread().name)
        return encode(text, **settings)

    monkeypatch.setattr(served, "encode", noted)
    client.post("/v1/completions", json={"prompt": ["a" * 200] * 60, "max_tokens": 1})
    client.post("/loglikelihood", json={"prefix_text": ["a" * 100] * 60, "text": ["a" * 100] * 60})
    client.post("/generate", json={"prefix_text": ["a" * 250] * 50})
    loops = {thread.name for thread in threading.enumerate() if thread.name.endswith("(<lambda>)")}
    assert len(threads) >= 170 and set(threads[:60]).isdisjoint(loops) and "MainThread" not in threads


def test_a_prompt_that_is_encoded_lets_other_threads_go_on(first):
    tokenizer, n_looks = first[1], 0
    encoding = threading.Thread(target=tokenizer.encode_prompt, args=["ab " * 60_000])
    encoding.start()
    gaps, last = [], time.perf_counter()
    begun = last
    while encoding.is_alive():
        time.sleep(0.001)
        gaps.append(time.perf_counter() - last)
        last += gaps[-1]
        n_looks += 1
    assert n_looks > 10 and max(gaps) < (last - begun) / 2


def test_log_probabilities_are_bounded_by_request_and_in_all(folder, monkeypatch):
    from open_lm.serve import service

    monkeypatch.setattr(service, "MAX_SCORES", 2000)
    monkeypatch.setattr(service, "MAX_OPEN_SCORES", 1999)
    with running(folder) as (url, state):
        body = {"prompt": ["x" * 100] * 2, "max_tokens": 1, "echo": True, "logprobs": 9}
        much = httpx.post(f"{url}/v1/completions", json={**body, "prompt": ["x" * 100] * 3})
        assert much.status_code == 400 and "3000 log-probabilities" in much.text
        busy = httpx.post(f"{url}/v1/completions", json=body)
        assert busy.status_code == 429 and int(busy.headers["retry-after"]) >= 1
        less = httpx.post(f"{url}/v1/completions", json={**body, "logprobs": 8}, timeout=60)
        assert less.status_code == 200
        assert until(lambda: n_open(state) == 0) and state.first.service._n_open_scores == 0


def test_a_request_for_too_many_texts_is_refused_before_any_is_made(client, server, monkeypatch):
    state = server[1] if isinstance(server, tuple) else server
    made = []
    for served in state.models.values():
        monkeypatch.setattr(type(served), "_ticket", lambda *args: made.append(args))
    answer = client.post("/v1/completions", json={"prompt": ["a"] * 1024, "n": 128, "max_tokens": 1})
    assert answer.status_code == 400 and "131072 texts in one request" in answer.text and not made


def test_stops_of_easylm_are_bounded(client):
    answer = client.post("/greedy-until", json={"prefix_text": ["a"], "until": [["x"] * 17]})
    assert answer.status_code == 400


def test_the_caches_of_several_models_fit_half_of_the_memory_together(folder, monkeypatch):
    from open_lm.serve import service

    monkeypatch.setattr(service, "_free_memory", lambda: 20 * 2 * 2 * 256 * 32 * 4)  # 20 slots
    with running(folder, "first", "second", slots=8) as (_, state):
        assert [served.service.n_slots for served in state.models.values()] == [8, 2]
