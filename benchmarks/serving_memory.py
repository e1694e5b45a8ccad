"""Is the memory of `openlm serve` flat while it is asked for everything that it does?

    python benchmarks/serving_memory.py --seconds 600

Clients ask for whole and streamed texts, log-probabilities, chats and log-likelihoods, leave in the middle of streams
and send bodies that are refused; the least and the most memory of the server's process is printed for every tenth of
the time: what requests hold comes and goes, the least is what stays. Before that, every slot reads a text as long as
the context, so that all of the cache has been used. Ends with 1 when anything was answered wrongly, or when the least
grew by more than 3 % in the last four fifths of the time.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
from serving import made, memory_mb, server

WORDS = 50_000


def words(rng, n):
    return " ".join(f"w{rng.randrange(WORDS)}" for _ in range(n))


class Clients:
    """Clients that ask one request after the other; wrong answers are kept."""

    def __init__(self, client, prompts, end):
        self.client, self.prompts, self.end = client, prompts, end
        self.done, self.faults, self.known = Counter(), Counter(), {}

    async def one(self, number):
        rng = random.Random(number)
        kinds = [self.whole, self.whole, self.streamed, self.leaving, self.scored, self.chat, self.likely, self.wrong]
        while time.monotonic() < self.end:
            kind = rng.choice(kinds)
            try:
                fault = await kind(rng)
            except Exception as error:
                fault = f"{type(error).__name__}"
            self.done[kind.__name__] += 1
            if fault:
                self.faults[f"{kind.__name__}: {fault}"] += 1

    async def posted(self, path, body, status=200):
        answer = await self.client.post(path, json=body)
        return answer.json(), None if answer.status_code == status else f"status {answer.status_code}"

    async def whole(self, rng):
        prompt = rng.choice(self.prompts)
        body = {
            "prompt": prompt,
            "max_tokens": 64,
            "temperature": 0,
            "stop": rng.choice([None, ["w1 w2 w3", "zz" * 400]]),
        }
        found, fault = await self.posted("/v1/completions", body)
        text = None if fault else found["choices"][0]["text"]
        return fault or ("another text" if self.known.setdefault(prompt, text) != text else None)

    async def streamed(self, rng, at_most=None):
        body = {"prompt": words(rng, rng.randint(1, 300)), "max_tokens": 100, "stream": True, "logprobs": 3, "n": 2}
        lines, last = 0, ""
        async with self.client.stream("POST", "/v1/completions", json={**body, "min_p": 0.01, "echo": True}) as answer:
            async for line in answer.aiter_lines():
                lines += 1
                if lines == at_most:
                    return None
                last = line or last
        return None if last == "data: [DONE]" else "no end"

    async def leaving(self, rng):
        return await self.streamed(rng, at_most=rng.randint(1, 20))

    async def scored(self, rng):
        n = rng.randint(2, 1500)
        body = {"prompt": words(rng, n), "max_tokens": 0, "echo": True, "logprobs": 5}
        found, fault = await self.posted("/v1/completions", body)
        return fault or (None if len(found["choices"][0]["logprobs"]["tokens"]) == n else "tokens are missing")

    async def chat(self, rng):
        messages = [{"role": "user", "content": words(rng, 20)}]
        body = {"messages": messages, "max_tokens": 30, "logprobs": True, "top_logprobs": 2}
        found, fault = await self.posted("/v1/chat/completions", body)
        return fault or (None if found["choices"][0]["message"]["role"] == "assistant" else "no answer")

    async def likely(self, rng):
        texts = [words(rng, rng.randint(1, 40)) for _ in range(rng.randint(1, 40))]
        found, fault = await self.posted("/loglikelihood", {"prefix_text": texts, "text": texts})
        return fault or (None if len(found["log_likelihood"]) == len(texts) else "texts are missing")

    async def wrong(self, rng):
        body = rng.choice([{"prompt": 5}, {"prompt": "x" * 100_000, "n": 10**9}, {"prompt": [[]] * 1000}, [], {"x": 1}])
        _, fault = await self.posted("/v1/completions", body, status=400)
        return fault


async def watched(url, process, prompts, args):
    """Clients at work for the time asked for, with the server's memory printed; returns faults and memories."""
    rng, memories = random.Random(0), []
    async with httpx.AsyncClient(
        base_url=url, timeout=600, limits=httpx.Limits(max_connections=args.clients)
    ) as client:
        full = [{"prompt": words(rng, 2047), "max_tokens": 1} for _ in range(args.slots)]
        await asyncio.gather(*[client.post("/v1/completions", json=body) for body in full])
        print(f"every slot used: {memory_mb(process):.0f} MB", flush=True)
        clients = Clients(client, prompts, time.monotonic() + args.seconds)
        work = asyncio.gather(*[clients.one(number) for number in range(args.clients)])
        for part in range(10):
            found = []
            for _ in range(100):
                await asyncio.sleep(args.seconds / 1000)
                found.append(memory_mb(process))
            memories.append(min(found))
            seconds, n = args.seconds * (part + 1) / 10, sum(clients.done.values())
            print(f"{seconds:5.0f} s: {min(found):.0f} to {max(found):.0f} MB, {n} requests", flush=True)
        await work
    print(json.dumps({"requests": clients.done, "faults": clients.faults}))
    return clients.faults, memories


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="open_lm_11m")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prompts = made(folder, args.model)
        command = ["-m", "open_lm.serve", "--checkpoint", folder / "model.pt", "--tokenizer", folder / "hf", "--device",
                   "cpu", "--port", "0", "--slots", args.slots]  # fmt: skip
        process, url = server(command, args.threads)
        try:
            faults, memories = asyncio.run(watched(url, process, prompts, args))
        finally:
            process.terminate()
            process.wait()
    growth = memories[-1] / memories[1] - 1
    print(f"least memory in the last four fifths: {100 * growth:+.1f} %")
    return bool(faults) or growth > 0.03


if __name__ == "__main__":
    sys.exit(main())
