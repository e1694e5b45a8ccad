"""The numbers of a ladder's runs against OLMo-core's, observed by running it (64 H100s, sequence 8192, 4×C)."""

import pytest

from open_lm.ladder.batches import plan_batch
from open_lm.ladder.run_configurator import WSDSChinchillaRunConfigurator
from open_lm.ladder.sizes import OLMO_VOCAB, ModelConfigurator, count_params

# size: N, target batch, actual batch, micro-batch, GPUs, peak LR, β2, tokens in B, steps, checkpoints
TABLE = """
60M 57.4 215057 262144 16384 16 0.0029 0.99 4.594 17524 1971 2190 4161 4381 8323 8762 16647 17524
100M 101.7 314886 262144 16384 16 0.0024 0.99 8.139 31048 3492 3881 7373 7762 14747 15524 29495 31048
190M 190.4 478126 524288 65536 8 0.00195 0.95 15.228 29046 3267 3631 6898 7261 13796 14523 27593 29046
370M 371.3 746371 786432 49152 16 0.00156 0.95 29.701 37767 4248 4721 8969 9442 17938 18883 35878 37767
600M 548.0 967540 983040 40960 24 0.00137 0.95 43.837 44593 5016 5574 10590 11148 21182 22297 42363 44593
760M 758.2 1201428 1310720 40960 32 0.00123 0.95 60.658 46278 5206 5785 10991 11570 21982 23139 43964 46278
1B 1279.4 1702828 1572864 32768 48 0.00103 0.95 102.351 65073 7320 8134 15454 16268 30910 32537 61819 65073
3B 3169.5 3117679 3145728 16384 64 0.00076 0.95 253.565 80606 9068 10076 19143 20151 38287 40303 76575 80606
7B 6887.6 5230522 5242880 8192 64 0.00059 0.95 551.006 105096 11823 13137 24960 26274 49920 52548 99841 105096
13B 13202.4 8071160 8388608 8192 64 0.000474 0.95 1056.193 125908 14164 15738 29903 31477 59806 62954 119612 125908
"""
VECTORS = {row.split()[0]: tuple(map(float, row.split()[1:])) for row in TABLE.strip().splitlines()}


def numbers_of(name, device_type="NVIDIA-H100", max_devices=64):
    spec = ModelConfigurator(8192, OLMO_VOCAB, device_type=device_type).size(name, None)
    n_params, rule = count_params(spec.architecture, "non-embedding"), WSDSChinchillaRunConfigurator()
    target = rule.target_batch_tokens(n_params)
    batch = plan_batch(target, spec.rank_microbatch_tokens, spec.mesh, max_devices, 8192)
    return n_params, batch, rule.numbers(n_params, batch.tokens)


@pytest.mark.parametrize("name", VECTORS)
def test_a_size_has_the_numbers_of_olmo_core(name):
    n_params, target, tokens, microbatch, gpus, lr, beta2, total, steps, *checkpoints = VECTORS[name]
    counted, batch, numbers = numbers_of(name)
    assert round(counted / 1e6, 1) == n_params
    assert (batch.target_tokens, batch.tokens, batch.rank_microbatch_tokens, batch.devices) == (
        target,
        tokens,
        microbatch,
        gpus,
    )
    assert numbers.peak_lr == pytest.approx(lr, abs=0.51e-5 if name != "13B" else 0.51e-6)
    assert (numbers.beta2, numbers.total_steps) == (beta2, steps)
    assert round(numbers.total_tokens / 1e9, 3) == total
    assert tuple(info.step for info in numbers.checkpoints) == (0, *map(int, checkpoints))
    assert (numbers.weight_decay, numbers.grad_clip_norm, numbers.z_loss) == (0.1, 1.0, 1e-5)
    assert numbers.warmup_tokens == counted
