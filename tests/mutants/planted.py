# ruff: noqa: E501
"""The planted bugs: in which file, what becomes what, and the tests that should notice. `make mutants` runs them."""

from typing import NamedTuple

STEP, PARALLEL, OPTIM, MUON = (f"open_lm/train/{name}.py" for name in ("step", "parallel", "optim", "muon"))
CHECKPOINT, DATA = "open_lm/checkpoint", "open_lm/data"
SCORING, METRICS, BATCHING = (f"open_lm/evaluate/engine/{name}.py" for name in ("scoring", "metrics", "batching"))
OWNERSHIP, CORNERS = "tests/checkpoint/test_ownership.py", "tests/commands/test_resume_corners.py"


class Mutant(NamedTuple):
    """One bug. `tests` are words for pytest."""

    file: str
    old: str
    new: str
    tests: str


def _of(file, tests, *pairs):
    return [Mutant(file, old, new, tests) for old, new in pairs]


PLANTED = [
    # the step
    *_of(STEP, "tests/train/test_parallel.py", (" * state.world.shape.n_shares)", ")"), ("enabled=is_last", "enabled=False")),
    *_of(
        STEP,
        "tests/train/test_step.py tests/train/test_golden_losses.py",
        ("parts += losses.parts", "parts = losses.parts"),
        ("state.lr_at(state.step)", "state.lr_at(state.step + 1)"),
        ("batch.split(accum)):\n        with grad_sync", "batch.split(1)):\n        with grad_sync"),
    ),
    *_of(STEP, "tests/train/test_step.py", (".clamp(min=1)\n    batch = state.task.prepare(state, batch, accum)\n    parts", "\n    batch = state.task.prepare(state, batch, accum)\n    parts")),
    *_of(STEP, "tests/train/test_averaging.py tests/commands/test_averages_in_runs.py", ("average.update(state.step)", "average.update(state.step - 1)")),
    *_of("open_lm/train/tasks.py", "tests/model/test_moe.py tests/train/test_step.py tests/train/test_moe_parallel.py", ("(self.balance_loss or 0.0) * n_targets * routing.balance_loss", "(self.balance_loss or 0.0) * routing.balance_loss")),
    *_of(
        "open_lm/train/tasks.py",
        "tests/train/test_distillation_losses.py tests/commands/test_distillation.py tests/train/test_step.py",
        ("share=1 - self.weight", "share=self.weight"),
        ("self.z_loss / share if share else 0.0", "self.z_loss"),
        ("plain.total + self.weight * divergence", "plain.total + divergence"),
    ),
    *_of(
        "open_lm/precision.py",
        "tests/train/test_precision.py tests/train/test_step.py",
        ("(~norm.isfinite()).float()", "norm.isnan().float()"),
        ("                self.scaler.unscale_(optimizer)", "                pass"),
        ("            self.scaler.update()\n", ""),
    ),
    *_of("open_lm/precision.py", "tests/train/test_spike_guard.py tests/train/test_step.py", ("        if taken:\n", "        if True:\n")),
    *_of(
        "open_lm/train/spike_guard.py",
        "tests/train/test_spike_guard.py",
        ("if len(seen) < LEAST", "if len(seen) < 2"),
        ("self._sigma * statistics.stdev", "statistics.stdev"),
    ),
    *_of(
        "open_lm/train/schedule.py",
        "tests/train/test_schedule.py",
        ("self.peak * (step + 1) / self.warmup_steps", "self.peak * step / self.warmup_steps"),
        ("bisect_right(ends, step)", "bisect_left(ends, step)"),
        ("step + self.at_end - first", "step - first"),
    ),
    # optimizers
    *_of(
        OPTIM,
        "tests/model/test_mamba.py tests/train/test_step.py tests/train/test_optimizers.py",
        (' and not name.endswith("A_log")', ""),
        ('parameter.ndim >= 2 and "embedding" not in name', "parameter.ndim >= 2"),
        ("torch._foreach_lerp(gradients, momenta, beta1)", "torch._foreach_lerp(gradients, momenta, beta2)"),
        ('torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])', 'torch._foreach_mul_(weights, 1 - group["weight_decay"])'),
        ("betas=(config.beta1, config.beta2), eps", "betas=(config.beta1, config.beta1), eps"),
    ),
    *_of(
        OPTIM,
        "tests/model/test_parametrization.py",
        ('lr * group.get("lr_scale", 1.0)', "lr"),
        ('group["eps"] * scale.eps', 'group["eps"]'),
    ),
    *_of(
        MUON,
        "tests/train/test_muon.py",
        ("if packing is None:", "if True:"),
        ("local_gradients, 1 - momentum)", "local_gradients, momentum)"),
        ("0.2 * max(matrix", "0.2 * min(matrix"),
        ("shard, out in zip(bucket, owners, shards, results.split(lengths, dim=1), strict=True):\n        if owner == rank", "shard, out in zip(bucket, owners, shards, results.split(lengths, dim=1), strict=True):\n        if owner == 0"),
        ("out in zip(bucket, owners, results.split(lengths), strict=True):\n        if owner == rank", "out in zip(bucket, owners, results.split(lengths), strict=True):\n        if True"),
        ("load[owners[number]] += lengths[number]", "load[owners[number]] += 0"),
        ('local.mul_(1 - group["lr"] * group["weight_decay"])', "local.mul_(1.0)"),
    ),
    # parallel
    *_of(
        PARALLEL,
        "tests/train/test_parallel.py tests/train/test_meshes.py -k 'limit or in_fp32 or ranks_do_not_change or two_ranks_take or micro_batch'",
        ("reduce_dtype=torch.float32", "reduce_dtype=torch.bfloat16"),
        ("clip_grads_with_norm_(group, limit, norm)", "clip_grads_with_norm_(group, 2 * limit, norm)"),
        ("torch.linalg.vector_norm(torch.stack(norms))", "torch.stack(norms).sum()"),
        ("model.set_requires_all_reduce(enabled)", "model.set_requires_all_reduce(False)"),
    ),
    *_of(PARALLEL, "tests/faults/test_kills.py -k four_ranks -m slow", ("    model.reducer._push_all_rebuilt_params()\n    model.reducer._rebuild_buckets()\n", "    pass\n")),
    *_of("open_lm/distributed.py", "tests/train/test_parallel.py", ('(shape.dp, shape.n_shards, shape.tp), ("copy"', '(shape.n_shards, shape.dp, shape.tp), ("copy"')),
    *_of(
        "open_lm/train/averaging.py",
        "tests/train/test_averaging.py tests/checkpoint/test_extra_state.py tests/commands/test_averages_in_runs.py",
        ('self._n = state["n"] if "n" in state', 'self._n = 0 if "n" in state'),
        ("if step % self.spec.every_n_steps:", "if False:"),
    ),
    # the checkpoint
    *_of(f"{CHECKPOINT}/restore.py", "tests/checkpoint/test_extra_state.py", ('state.precision.load_state_dict(facts["scaler"])', "pass")),
    *_of(f"{CHECKPOINT}/restore.py", "tests/train/test_random_state.py", ("        _restore_random(facts, checkpoints, state)\n", "")),
    *_of(
        f"{CHECKPOINT}/restore.py",
        f"{CORNERS} -k 'add_up or another_batch'",
        ("    if rest:\n", "    if False:\n"),
        ("    if before != now:\n", "    if False:\n"),
    ),
    *_of(f"{CHECKPOINT}/restore.py", "tests/faults/test_folders.py -k flags -m slow", ('loader.check_state(facts["data_state"] | {"steps": state.step})', "pass")),
    *_of(
        f"{CHECKPOINT}/writing.py",
        OWNERSHIP,
        ("require_sizes(target.folder, named)", "pass"),
        ("        self.require_owner()\n        commits.publish", "        commits.publish"),
    ),
    *_of(f"{CHECKPOINT}/writing.py", "tests/faults/test_folders.py -k zombie", ("        with contextlib.suppress(FolderLocked):\n            self.require_owner()\n", "        if True:\n")),
    *_of(
        f"{CHECKPOINT}/retention.py",
        OWNERSHIP,
        ("    storage.remove(storage.join(folder, commit.commit_name))\n    for name in commit.files:\n        storage.remove(storage.join(folder, name))\n",
         "    for name in commit.files:\n        storage.remove(storage.join(folder, name))\n    storage.remove(storage.join(folder, commit.commit_name))\n"),
        ("if processes.is_here(owner) and processes.is_running(owner):", "if False:"),
        ("if commit.label not in pinned:", "if True:"),
        ("(c.branch, c.step) > (branch, step)", "c.branch > branch"),
        ("if name not in spoken_for:", "if True:"),
    ),
    *_of(
        f"{CHECKPOINT}/commit.py",
        f"tests/checkpoint/test_commit.py {OWNERSHIP}",
        ("        if found != record.size_bytes:", "        if False:"),
        ("if set(loaded) != FIRST_KEYS and", "if False and"),
        ("(-commit.branch, -commit.step)", "(-commit.step, -commit.branch)"),
    ),
    *_of(f"{CHECKPOINT}/checksum.py", "tests/faults/test_damage.py -k flips", ("    return record_of(path, algorithm) == record", "    return True")),
    *_of(f"{CHECKPOINT}/commit.py", "tests/faults/test_damage.py -k flips", ('weights if part == "weights" and weights else None', "weights")),
    *_of(
        f"{CHECKPOINT}/save_policy.py",
        f"tests/checkpoint/test_save_policy.py {OWNERSHIP}",
        ("alike[n_kept:]", "alike[n_kept + 1 :]"),
        ('            return "fixed"', '            return "step"'),
        ("if not commit.is_newer]", "if True]"),
    ),
    *_of(
        f"{CHECKPOINT}/snapshot.py",
        "tests/commands/test_save_flags.py tests/checkpoint/test_async.py tests/checkpoint/test_sharded.py",
        ('                moments["step"].zero_()', "                pass"),
        ("partial(staging.copy, name) if staging is not None else _on_cpu", "_on_cpu"),
    ),
    *_of(
        f"{CHECKPOINT}/manager.py",
        "tests/checkpoint/test_async.py tests/faults/test_full_disks.py",
        ("MAX_FAILED_SAVES = 3", "MAX_FAILED_SAVES = 300"),
        ("self._failed_saves + 1 if self.problem else 0", "self._failed_saves + bool(self.problem)"),
    ),
    *_of("open_lm/train/step.py", "tests/checkpoint/test_async.py -k before_the_copy", ("        state.copied.wait()", "        pass")),
    *_of(
        f"{CHECKPOINT}/writing.py",
        "tests/checkpoint/test_single_ranks.py",
        ("if world.is_master and not made:", "if world.is_master:"),
    ),
    *_of(
        "open_lm/run/opened.py",
        "tests/faults/test_signals.py -k 'third or last_copies or long_save'",
        ("if error.on_all_ranks:", "if False:"),
        ("stack.callback(run.stop_requests.note)", "stack.callback(run.stop_requests.forget)"),
        ("        self.watchdog.beat(LEEWAY)\n", ""),
    ),
    *_of(
        f"{CHECKPOINT}/sharded.py",
        "tests/checkpoint/test_sharded.py",
        ("if is_type or name in _KNOWN.get(module, ()):", "if True:"),
        ("if info is None or", "if False and"),
    ),
    # the remote copy
    *_of(
        f"{CHECKPOINT}/remote_sync.py",
        f"{OWNERSHIP} tests/checkpoint/test_mirror.py",
        ("        with self._retention.pinned(commit):\n", "        if True:\n"),
        ("if state.st_size < before[0] and", "if False and"),
        ("except (OpenLMError, OSError) as error:\n            self._failed", "except CheckpointError as error:\n            self._failed"),
    ),
    *_of(
        f"{CHECKPOINT}/fetch.py",
        "tests/checkpoint/test_latest.py tests/checkpoint/test_mirror.py tests/checkpoint/test_remote_sync.py",
        ("here[name], commit.files[name])", "here[name])"),
        ("(n_there > n_here if", "(theirs_are_ahead if"),
        ('if os.path.isabs(name) or ".." in Path(name).parts:', "if False:"),
    ),
    *_of(f"{CHECKPOINT}/latest.py", "tests/checkpoint/test_latest.py", ("(-one.commit.branch, -one.commit.step)", "(-one.commit.step, -one.commit.branch)")),
    *_of(
        f"{CHECKPOINT}/retention.py",
        "tests/checkpoint/test_deletion.py",
        ("committed(folder) if self._has_begun else []", "committed(folder)"),
        ("                self.require_owner()\n                discard", "                discard"),
    ),
    *_of(f"{CHECKPOINT}/upload.py", OWNERSHIP, ("            _require(summing.record(), expected, path)", "            pass")),
    # the run
    *_of("open_lm/run/recorder.py", "tests/faults/test_stuck_and_spoilt.py -k finite", ("math.isfinite(loss) and math.isfinite(grad_norm)", "math.isfinite(loss)")),
    *_of("open_lm/run/lock.py", "tests/commands/test_lock.py tests/faults/test_folders.py -k 'second or lock or dead'", ("            if processes.is_running(owner):\n", "            if False:\n")),
    # the loader and the plan
    *_of(
        f"{DATA}/loader.py",
        "tests/data/test_read_proof.py tests/data/test_loader.py tests/data/test_elastic.py",
        ("if rows.read_checksum != expected:", "if False:"),
        ("if changed is not None:", "if False:"),
        ("needed > self.n_sequences:", "needed > self.n_sequences + 8:"),
        ('"seed", "samples_consumed"', '"samples_consumed"'),
        ("inputs_BT[rows], targets_BT[rows] = 0, IGNORED", "inputs_BT[rows], targets_BT[rows] = 0, 0"),
    ),
    *_of(f"{DATA}/permutations.py", "tests/data/test_plan.py", ("np.uint64(30), np.uint64(27)", "np.uint64(30), np.uint64(28)")),
    *_of(
        f"{DATA}/plan.py",
        "tests/data/test_plan.py",
        ('key("shards", self.seed, self.salt, number)', 'key("shards", self.seed, self.salt, 0)'),
        ("stripe * self._n[at] // self._stripes[at]\n", "stripe * (self._n[at] // self._stripes[at])\n"),
        ("end = np.minimum(first + number * block, length)", "end = first + number * block"),
        ('side="right") - 1\n        return self._order', 'side="left") - 1\n        return self._order'),
    ),
    # masks
    *_of(
        f"{DATA}/masking.py",
        "tests/data/test_masking.py tests/data/test_validation.py tests/post_training/test_chat_data.py",
        ("is_marker_BT.flip(1).cumsum(1).flip(1) > 0", "is_marker_BT.cumsum(1) > 0"),
        ("masked_BT | (targets_BT == individual)", "masked_BT & (targets_BT == individual)"),
        ("places_T >= n_kept_B", "places_T > n_kept_B"),
        ("marks_BS[:, 1:] != 0", "marks_BS[:, :-1] != 0"),
    ),
    # scoring
    *_of(
        BATCHING,
        "tests/evaluate/icl/test_icl_scoring.py tests/evaluate/icl/test_icl_engine.py",
        ("self.choice.continuation[:-1]", "self.choice.continuation"),
        ("len(choice.context) - 1 :", "len(choice.context) :"),
        ("range(n_shared, len(ids))", "range(n_before, len(self.tokens))"),
        ("self.ends[node] = len(self.tokens)", "self.ends[node] = len(self.tokens) - 1"),
    ),
    *_of(
        SCORING,
        "tests/evaluate/icl/test_icl_scoring.py tests/evaluate/icl/test_icl_engine.py",
        ("torch.empty_like(stats_N4).index_copy_(0, order_N, stats_N4)", "stats_N4"),
        ("row * longest + node", "row * len(tree.tree.tokens) + node"),
        ("sum(losses) / n, all(greedy)", "sum(losses), all(greedy)"),
    ),
    *_of(
        "open_lm/model/trees.py",
        "tests/evaluate/icl/test_icl_scoring.py",
        ("queries_T1 < self.ends_BL[:, None, keys]", "queries_T1 <= self.ends_BL[:, None, keys]"),
        ("self.depths_BL[:, queries, None], self.depths_BL[:, None, keys]", "queries_T1, keys_S"),
    ),
    *_of(
        METRICS,
        "tests/evaluate/icl",
        ("np.argmin(np.exp", "np.argmax(np.exp"),
        ("likely.max() / likely.sum()", "likely.max()"),
        ("max(1, len(correct) - 1)", "max(1, len(correct))"),
    ),
]  # fmt: skip
