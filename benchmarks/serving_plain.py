"""A plain server around transformers' `generate`, what most people write first: one request at a time, FastAPI."""

import logging
import socket
import sys
import threading

import torch
import uvicorn
from fastapi import FastAPI
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    app, lock = FastAPI(), threading.Lock()

    @app.post("/v1/completions")
    def completions(body: dict):
        ids = tokenizer(body["prompt"], return_tensors="pt", add_special_tokens=False)
        with lock, torch.inference_mode():
            out = model.generate(
                input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], max_new_tokens=body["max_tokens"],
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
        new = out[0, ids["input_ids"].shape[1] :]
        return {"choices": [{"text": tokenizer.decode(new)}], "usage": {"completion_tokens": len(new)}}

    listener = socket.create_server(("127.0.0.1", 0))
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    logging.info("serving on http://127.0.0.1:%d", listener.getsockname()[1])
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main(sys.argv[1])
