"""Attention, loss and meshes on GPUs: kernels against plain torch, several GPUs against one."""

import json

import pytest
import torch
from runs import flags, metrics, run, run_command, write_data

from open_lm.kernels import linear_cross_entropy as loss
from open_lm.kernels.loss_chunks import LossChunk, rows_per_chunk, sums_in_chunks
from open_lm.model import attend_masked
from open_lm.model.mask import Mask, Reach

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("rule", ["window", "documents", "both"])
@pytest.mark.parametrize(("kv_heads", "n_queries"), [(8, 1024), (2, 1024), (2, 384)])
def test_flex_attention_equals_attention_in_blocks_and_so_do_its_gradients(rule, kv_heads, n_queries):
    documents = (torch.arange(1024, device=DEVICE) // 300).expand(2, 1024)
    mask = Mask(
        n_queries, 1024, DEVICE,
        reach=Reach(None if rule == "documents" else 200), documents_BS=None if rule == "window" else documents,
    )  # fmt: skip
    torch.manual_seed(0)
    shapes = ((2, n_queries, 8, 64), (2, 1024, kv_heads, 64), (2, 1024, kv_heads, 64))  # a rank of cp has fewer queries
    first = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    second = [x.detach().clone().requires_grad_() for x in first]
    one, other = attend_masked.masked_attention(*first, mask), attend_masked.in_blocks(*second, mask)
    torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)
    one.square().sum().backward()
    other.square().sum().backward()
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(x.grad, y.grad, atol=5e-2, rtol=5e-2)


def test_a_long_document_mask_needs_no_dense_mask():
    documents = (torch.arange(32_768, device=DEVICE) // 1000)[None]
    q = torch.randn(1, 32_768, 4, 64, device=DEVICE, dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend_masked.masked_attention(q, q, q, Mask(32_768, 32_768, DEVICE, documents_BS=documents))
    assert torch.cuda.max_memory_allocated() - before < 32_768**2 / 2  # the dense mask alone is twice that


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fused_loss_equals_the_chunked_one(dtype):
    kind = loss._fused_chunk()
    assert kind is not None, "CUDA builds of torch bring Triton"
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 256, device=DEVICE).to(dtype), torch.randn(50_432, 256, device=DEVICE).to(dtype)
    targets = torch.randint(0, 50_432, (300,), device=DEVICE)
    targets[7] = -100
    n_rows = rows_per_chunk(300, 256, 50_432)
    plain, fused = (sums_in_chunks(c(n_rows, weight, 1e-3), hidden, weight, targets, True) for c in (LossChunk, kind))
    torch.testing.assert_close(fused[0], plain[0], rtol=1e-3, atol=1e-2)
    for one, other in zip(fused[1], plain[1], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * other.abs().max().item())


@pytest.mark.parametrize("extra", [["--fsdp", "--force-distributed", "--fsdp-cpu-offload", "--grad-clip-norm", "1"],
                                   ["--doc-mask", "--doc-mask-token", "0"],
                                   ["--torchcompile", "--doc-mask", "--doc-mask-token", "0"]])  # fmt: skip
def test_it_trains(tmp_path, extra):
    run(tmp_path, write_data(tmp_path / "data"), "--device", "cuda", "--precision", "amp_bf16", *extra)
    losses = list(metrics(tmp_path).values())
    assert losses[-1] < losses[0]


EXPERTS = {"moe_freq": 2, "moe_num_experts": 4, "moe_capacity_factor": 0.0, "moe_loss_weight": 0.0}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("mesh", ["dp=2", "fsdp=2", "tp=2", "cp=2", "ep=2"])
def test_two_gpus_take_the_steps_of_one_which_goes_on_from_their_checkpoint(tmp_path, mesh):
    manifest = write_data(tmp_path / "data")
    model = {"hidden_dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "seq_len": 16, "vocab_size": 16}
    (tmp_path / "model.json").write_text(json.dumps(model | (EXPERTS if "ep" in mesh else {})))
    common = ["--model", str(tmp_path / "model.json"), "--device", "cuda", "--precision", "fp32"]
    common += ["--num-checkpoints", "2"]
    sharded = ["--mesh", mesh, "--checkpoint-format", "consolidated" if mesh == "dp=2" else "sharded"]
    for name, ranks, extra in (
        ("one", 1, []),
        ("two", 2, sharded),
        ("broken", 2, [*sharded, "--stop-at-step", "7"]),
        ("broken", 1, ["--resume", "latest"]),
    ):
        done = run_command(flags(tmp_path, manifest, *common, *extra, name=name), ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    expected = metrics(tmp_path, "one")
    for name in ("two", "broken"):
        assert metrics(tmp_path, name) == pytest.approx(expected, abs=1e-3), name
