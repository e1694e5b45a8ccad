"""Generation benchmark: tokens per second beside transformers with the same weights.

    python benchmarks/generation.py --model open_lm_160m --dtype bfloat16

Both programs write the same number of tokens greedily after the same prompts, one after the other in turns; the median
of the turns counts, in wall time and in CPU time, which other programs on the machine disturb less. The model is a
Llama in transformers (rms_norm, rotary, swiglu) with random weights.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from open_lm.generation import generate
from open_lm.hf.classes import save, to_transformers
from open_lm.model import create_model
from open_lm.model.config import ModelFlags, resolve_architecture


def seconds(call):
    """Wall and CPU seconds of a call, and what it returns."""
    start, cpu_start = time.perf_counter(), time.process_time()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start, time.process_time() - cpu_start), result


def transformers_model(model, device):
    """The same weights in transformers' own class."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save(to_transformers(model.config, model.state_dict()), Path(folder))
        return AutoModelForCausalLM.from_pretrained(folder, dtype=model.output.weight.dtype).to(device).eval()


def theirs(model, ids_BT, n_new, cache):
    with torch.inference_mode():
        out = model.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=n_new, do_sample=False, pad_token_id=0,
            eos_token_id=None, cache_implementation=cache,
        )  # fmt: skip
    return out[:, ids_BT.shape[1] :].tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="open_lm_160m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=256, help="tokens to write")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--their-cache", choices=("dynamic", "static"), default="dynamic", help="of transformers")
    parser.add_argument("--threads", type=int, help="of torch; 1 where other programs keep the cores busy")
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = replace(resolve_architecture(ModelFlags(model=args.model)), model_norm="rms_norm")
    model = create_model(config).to(device, getattr(torch, args.dtype)).eval()
    reference = transformers_model(model, device)
    print(f"{args.model}, {args.dtype}, {device}, {torch.get_num_threads()} threads, {args.prompt} + {args.new} tokens")
    for batch in args.batch:
        ids_BT = torch.randint(config.vocab_size, (batch, args.prompt), device=device)
        calls = {
            "OpenLM": partial(generate, model, ids_BT.tolist(), temperature=0, max_gen_len=args.new),
            "transformers": partial(theirs, reference, ids_BT, args.new, args.their_cache),
        }
        generate(model, ids_BT.tolist(), temperature=0, max_gen_len=2)  # the first call may compile kernels
        theirs(reference, ids_BT, 2, args.their_cache)
        times, texts = {name: [] for name in calls}, {}
        for _ in range(args.turns):
            for name, call in calls.items():
                t, texts[name] = seconds(call)
                times[name].append(t)
        ours, other = texts.values()
        same = sum(a == b for row, row2 in zip(ours, other, strict=True) for a, b in zip(row, row2, strict=True))
        rates = ", ".join(
            f"{name} {batch * args.new / statistics.median(wall for wall, _ in t):.1f}" for name, t in times.items()
        )
        ratios = [(b[0] / a[0], b[1] / a[1]) for a, b in zip(times["OpenLM"], times["transformers"], strict=True)]
        wall, cpu = (sorted(kind) for kind in zip(*ratios, strict=True))
        print(
            f"batch {batch}: tokens/s {rates}; ratio {statistics.median(wall):.2f} ({wall[0]:.2f} to {wall[-1]:.2f}), "
            f"in CPU time {statistics.median(cpu):.2f} ({cpu[0]:.2f} to {cpu[-1]:.2f}); "
            f"{same / batch / args.new:.0%} of the tokens equal",
            flush=True,
        )


if __name__ == "__main__":
    main()
