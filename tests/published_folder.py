"""A folder like OpenLM's published ones: DCLM's keys in config.json, `model.` before names, GPT-NeoX's tokenizer.

Its weights and logits come from a plain fp64 implementation here that shares no line with either of the project's.
"""

import json
import math

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PARAMS = {
    "dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 300, "norm_eps": 1e-05, "seq_len": 64,
    "post_embed_norm": False, "weight_tying": False, "norm_type": "gain_only_lp_layer_norm",
    "attn_name": "xformers_attn", "apply_qk_norm": True, "ffn_type": "swiglu_torch",
    "positional_embedding_type": "rotary", "moe_loss_weight": 0.1, "moe_capacity_factor": 1.25,
    "moe_expert_model_parallelism": False, "moe_weight_parallelism": False, "moe_num_experts": 8, "moe_freq": 0,
    "moe_top_k": 2, "attn_activation": None, "attn_seq_scalar": None, "attn_seq_scalar_alpha": None,
}  # fmt: skip
HEAD = {"architectures": ["OpenLMForCausalLM"], "model_type": "openlm", "torch_dtype": "float32",
        "transformers_version": "4.40.2"}  # fmt: skip
WIDTH = 256


def weights(params, seed=0):
    """Random weights under the published names, the constant that old files hold included."""
    generator = torch.Generator().manual_seed(seed)
    dim, head = params["dim"], params["dim"] // params["n_heads"]

    def normal(*shape, std):
        return torch.randn(shape, generator=generator) * std

    vocabulary = (params["vocab_size"], dim)
    out = {
        "tok_embeddings.weight": normal(*vocabulary, std=dim**-0.5),
        "output.weight": normal(*vocabulary, std=3 * dim**-0.5),
        "norm.weight": 1 + normal(dim, std=0.1),
    }
    for n in range(params["n_layers"]):
        at = f"layers.{n}."
        out |= {
            at + "attention.in_proj.weight": normal(3 * dim, dim, std=2 * dim**-0.5),
            at + "attention.out_proj.weight": normal(dim, dim, std=dim**-0.5),
            at + "attention.pos_embed.inv_freq": 10_000.0 ** (-torch.arange(0, head, 2) / head),
            at + "feed_forward.w12.weight": normal(2 * WIDTH, dim, std=dim**-0.5),
            at + "feed_forward.w3.weight": normal(dim, WIDTH, std=WIDTH**-0.5),
        }
        for norm in ("attention_norm", "ffn_norm", "attention.q_norm", "attention.k_norm"):
            out[f"{at}{norm}.weight"] = 1 + normal(dim, std=0.1)
    return {f"model.{name}": tensor for name, tensor in out.items()}


def logits(params, state, ids_BT):
    """The logits that the model must compute, in fp64, position by position."""
    w = {name.removeprefix("model."): tensor.double() for name, tensor in state.items()}
    dim, n_heads = params["dim"], params["n_heads"]
    head = dim // n_heads

    def norm(x, gain):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + params["norm_eps"]).sqrt() * w[gain]

    def turned(x_TK, positions):
        angles = torch.outer(positions, 10_000.0 ** (-torch.arange(0, head, 2).double() / head))
        whole = torch.complex(x_TK[:, : head // 2], x_TK[:, head // 2 :]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((whole.real, whole.imag), -1)

    rows = []
    for ids in ids_BT:
        positions = torch.arange(len(ids)).double()
        x = w["tok_embeddings.weight"][ids]
        for n in range(params["n_layers"]):
            at = f"layers.{n}."
            q, k, v = (norm(x, at + "attention_norm.weight") @ w[at + "attention.in_proj.weight"].T).chunk(3, -1)
            q, k = norm(q, at + "attention.q_norm.weight"), norm(k, at + "attention.k_norm.weight")
            mixed = []
            for h in range(n_heads):
                part = slice(h * head, (h + 1) * head)
                scores = turned(q[:, part], positions) @ turned(k[:, part], positions).T / math.sqrt(head)
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
                mixed.append(scores.softmax(-1) @ v[:, part])
            x = x + torch.cat(mixed, -1) @ w[at + "attention.out_proj.weight"].T
            gate, value = (norm(x, at + "ffn_norm.weight") @ w[at + "feed_forward.w12.weight"].T).chunk(2, -1)
            x = x + (gate * torch.sigmoid(gate) * value) @ w[at + "feed_forward.w3.weight"].T
        rows.append(norm(x, "norm.weight") @ w["output.weight"].T)
    return torch.stack(rows)


def tokenizer(folder, vocab_size):
    """A byte-level tokenizer of GPT-NeoX's kind, trained on a few words."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>", "<|padding|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(["Machine learning is the study of machines that learn"] * 20, trainer)
    made.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPTNeoXTokenizer", **named}))


def make(folder, *, nested=False, **changes):
    """Write the folder of a model and return `(folder, ids, logits)`.

    `nested`: the parameters lie in params_args_dict, as in DCLM-7B.
    """
    params = {**PARAMS, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    config = {**HEAD, "params_args_dict": params} if nested else {**HEAD, **params}
    (folder / "config.json").write_text(json.dumps(config))
    state = weights(params)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer(folder, params["vocab_size"])
    ids_BT = torch.randint(2, params["vocab_size"], (2, 17), generator=torch.Generator().manual_seed(7))
    return folder, ids_BT, logits(params, state, ids_BT)
