"""Texts that join and leave a running batch become what they become alone, down to the bits of their scores."""

from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS, make_model

from open_lm.generation import generate
from open_lm.generation.config import GenerateConfig
from open_lm.generation.cpu_decode import cpu_decode
from open_lm.generation.decode import evaluating
from open_lm.generation.engine import Engine
from open_lm.generation.text import Text
from open_lm.kernels import native
from open_lm.model import create_model
from open_lm.model.config import ModelConfig
from open_lm.model.slots import SlotCache

VOCAB = 53
PROMPTS = [
    torch.randint(2, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 11, 1, 7, 20)
]
SETTINGS = [
    {"temperature": 0},
    {"temperature": 1.3, "top_p": 1.0},
    {"temperature": 0.9, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.8, "min_p": 0.05, "seed": 7},
    {"temperature": 0, "repetition_penalty": 1.5},
]


def text(prompt, n_new=9, **settings):
    return Text(prompt, GenerateConfig(**{"temperature": 0, **settings}), n_new, n_top=2)


@torch.inference_mode()
def run(model, texts, *, every=0, n_slots=3, block=4, max_len=40):
    """Write texts, a new one joining `every` that many steps (0: all at once)."""
    engine, waiting, steps = Engine(model, n_slots, max_len, block=block), list(texts), 0
    with cpu_decode(model):
        while waiting or engine.busy:
            if waiting and (not every or steps % every == 0):
                engine.add(waiting.pop(0))
            if not waiting or every:
                engine.step()
            steps += 1
    return engine


def alone(model, prompt, n_new, **settings):
    found = text(prompt, n_new, **settings)
    run(model, [found])
    return found


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_among_strangers_a_text_is_what_it_is_alone(name):
    model = make_model(name)
    asked = [(prompt, 4 + 3 * i, SETTINGS[i]) for i, prompt in enumerate(PROMPTS)]
    together = [text(prompt, n, **settings) for prompt, n, settings in asked]
    run(model, together, every=2)
    for found, (prompt, n, settings) in zip(together, asked, strict=True):
        assert found.tokens == alone(model, prompt, n, **settings).tokens
        assert (found.finish, len(found.tokens)) == ("length", n)


@pytest.mark.parametrize("window", [1, 5, 30])
def test_a_sliding_window_slides_in_every_row_by_its_own_length(window):
    torch.manual_seed(0)
    sizes = {"hidden_dim": 32, "n_layers": 2, "n_heads": 2, "seq_len": 40, "vocab_size": VOCAB}
    model = create_model(ModelConfig(**sizes, sliding_window=window)).eval()
    together = [text(prompt, 9) for prompt in PROMPTS]
    run(model, together, every=1)
    for found in together:
        logits = model(torch.tensor([[*found.prompt, *found.tokens]]))[0][0, len(found.prompt) - 1 : -1]
        assert found.tokens == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_heads": 8},
        {"n_heads": 8, "n_kv_heads": 1},
        {"n_kv_heads": 2, "positional_embedding_type": "llama_rotary"},
        {"sliding_window": 5},
        {"qk_norm": True},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_kernels_its_log_probabilities_are_equal_to_the_bit(dtype, changes):
    if not native.use_cpu_kernels():
        pytest.skip("the C++ kernels do not run here: no compiler or no AVX-512")
    torch.manual_seed(0)
    sizes = {"hidden_dim": 64, "n_layers": 2, "n_heads": 4, "seq_len": 40, "vocab_size": VOCAB}
    model = create_model(ModelConfig(**{**sizes, "model_norm": "rms_norm", **changes})).to(dtype).eval()
    try:
        together = [text(prompt, 9, **settings) for prompt, settings in zip(PROMPTS, SETTINGS, strict=True)]
        run(model, together, every=1, n_slots=5)
        singles = [alone(model, prompt, 9, **settings) for prompt, settings in zip(PROMPTS, SETTINGS, strict=True)]
    finally:
        native.use_cpu_kernels(False)
    assert [found.scores for found in together] == [single.scores for single in singles]


@pytest.mark.parametrize("name", ["llama", "own_published", "mamba", "own_custom", "own_experts"])
@torch.inference_mode()
def test_scores_are_those_of_one_forward_pass(name):
    model = make_model(name)
    found = Text(PROMPTS[4], GenerateConfig(temperature=0), 6, n_top=3, score_from=1)
    run(model, [text(PROMPTS[1]), found], every=1)
    whole = [*found.prompt, *found.tokens]
    if name == "own_custom":  # its attention depends on how many keys there are: positions are read one by one
        whole = whole[: len(found.prompt)]
    expected = model(torch.tensor([whole]))[0][0].double().log_softmax(-1)
    scores = [*found.prompt_scores, *found.scores][: len(whole) - 1]
    assert [score.token for score in scores] == whole[1:]
    for place, score in enumerate(scores):
        assert score.log_probability == pytest.approx(expected[place, score.token].item(), abs=2e-4)
        assert [p for _, p in score.top] == pytest.approx(expected[place].topk(3).values.tolist(), abs=2e-4)
        assert score.is_greedy == (score.token == expected[place].argmax().item())


def test_a_shared_beginning_is_computed_once_and_changes_nothing():
    model, beginning = make_model("llama"), PROMPTS[4][:13]
    prompts = [[*beginning, *PROMPTS[i]] for i in range(4)]
    together = [text(prompt) for prompt in prompts]
    engine = run(model, together, n_slots=4)
    assert [found.n_shared for found in together] == [0, 12, 12, 12]
    assert engine.n_shared_tokens == 36
    assert engine.n_prompt_tokens == sum(map(len, prompts)) - 36
    for found, single in zip(together, [alone(model, prompt, 9) for prompt in prompts], strict=True):
        assert found.tokens == single.tokens and found.scores[0] == single.scores[0]


def test_a_beginning_outlives_its_text_until_its_slot_is_taken():
    model, prompt = make_model("llama"), PROMPTS[4]
    again = [text(prompt), text(prompt), text(PROMPTS[1]), text(prompt)]
    engine = run(model, again, n_slots=1)
    assert [found.n_shared for found in again] == [0, 16, 0, 0]
    assert again[0].scores == again[1].scores == again[3].scores  # alone in the batch, so to the bit
    assert not engine.busy


@pytest.mark.parametrize("score_from", [1, 6, 19])
def test_prompts_to_be_scored_share_only_what_comes_before(score_from):
    model, prompt = make_model("llama"), PROMPTS[4]
    scored = Text(prompt, GenerateConfig(temperature=0), 0, score_from=score_from)
    run(model, [text(prompt), scored])
    assert len(scored.prompt_scores) == len(prompt) - score_from
    assert (scored.finish, scored.tokens, scored.n_shared) == ("length", [], (score_from - 1) // 4 * 4)


def test_a_cancelled_text_frees_its_slot_at_the_next_step():
    model = make_model("llama")
    with torch.inference_mode():
        engine = Engine(model, 1, 40)
        first, second = text(PROMPTS[0], 30), text(PROMPTS[1], 3)
        engine.add(first), engine.add(second)
        for _ in range(3):
            engine.step()
        first.cancelled = True
        assert first in engine.step()
        assert first.finish == "cancelled" and 0 < len(first.tokens) < 30
        while engine.busy:
            engine.step()
    assert second.tokens == alone(model, PROMPTS[1], 3).tokens


class CancelledLate(Text):
    """A text that another thread cancels just after the engine has looked whether it is cancelled."""

    looks = 0

    @property
    def cancelled(self):
        self.looks += self.is_armed
        return self.looks > 1

    @cancelled.setter
    def cancelled(self, value):
        self.is_armed = value


def test_a_text_that_is_cancelled_between_two_looks_ends_once_and_keeps_its_slot_till_then():
    model = make_model("llama")

    @torch.inference_mode()
    def written(late):
        greedy = GenerateConfig(temperature=0)
        first, writing, waiting = (
            Text([2, 3], greedy, 30),
            CancelledLate([4, 5], greedy, 30),
            CancelledLate([6], greedy, 9),
        )
        stranger = Text([7, 8, 9], greedy, 20)
        engine, told = Engine(model, 2, 40, block=4), []
        for one in (first, writing, stranger, waiting):
            engine.add(one)
        for _ in range(4):
            engine.step()
        first.cancelled = True
        writing.cancelled = waiting.cancelled = late
        while engine.busy:
            told += engine.step()
        return stranger.tokens, [one.finish for one in (writing, waiting) if one in told]

    expected, _ = written(late=False)
    assert written(late=True) == (expected, ["cancelled", "cancelled"])


def test_a_model_that_computes_nan_ends_its_texts():
    model = make_model("llama")
    torch.nn.init.constant_(model.norm.weight, float("nan"))
    found = text(PROMPTS[0])
    run(model, [found])
    assert (found.finish, found.tokens) == ("error", [])


@pytest.mark.parametrize("settings", [{"temperature": 1.0, "seed": 5}, {"temperature": 0}])
def test_generate_gives_every_text_what_it_is_given_alone(settings):
    model = make_model("llama")
    together = generate(model, PROMPTS, max_gen_len=12, **settings)
    assert together == [generate(model, [prompt], max_gen_len=12, **settings)[0] for prompt in PROMPTS]
    assert together == generate(model, PROMPTS, max_gen_len=12, batch_size=2, **settings)


def test_equal_prompts_are_drawn_differently():
    texts = generate(make_model("llama"), [PROMPTS[1]] * 4, max_gen_len=12, temperature=1.5, top_p=1.0)
    assert len({tuple(found) for found in texts}) == 4


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"num_beams": 2}])
def test_each_text_has_its_own_room_in_the_context(settings):
    model = make_model("llama")
    texts = generate(model, PROMPTS, max_gen_len=1000, **settings)
    assert [len(found) for found in texts] == [40 - len(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"num_beams": 2}])
def test_a_training_model_stays_one(settings):
    model = make_model("llama").train()
    model.layers[1].eval()
    generate(model, PROMPTS, max_gen_len=2, **settings)
    assert model.training and model.layers[0].training and not model.layers[1].attention.training
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert model.training


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from Linux")
def test_the_memory_of_slots_is_taken_as_they_are_written_to():
    def resident():
        return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024

    before = resident()
    cache = SlotCache(4, 64, 2048, (4, 32), torch.device("cpu"), torch.float32)  # 512 MB
    for layer in cache.layers:
        layer.k_NSGK[:, :8] = 1.0
    assert resident() - before < 64
    assert cache.layers[0].k_NSGK[3, 7].sum() == 128 and cache.layers[0].k_NSGK[3, 8:].count_nonzero() == 0
