# ruff: noqa: E501
"""Planted bugs of meshes, of attention under masks, of the loss's kernel and of float8; as in planted.py."""

from planted import _of

TRAIN = "open_lm/train"
MASK, MESHES = "tests/model/test_mask.py", "tests/train/test_meshes.py"

IN_MESHES = [
    # attention inside documents and windows
    *_of(
        "open_lm/model/mask.py",
        MASK,
        ("seen & (key > query - window)", "seen & (key >= query - window)"),
        ("int(earlier_BS.sum(1).min())", "int(earlier_BS.sum(1).max())"),
        ("max(0, query - self.window + 1)", "0"),
        ("self.documents_BS, self.real_BS = documents_BS, real_BS", "self.documents_BS, self.real_BS = None, real_BS"),
    ),
    *_of(
        "open_lm/model/attend_masked.py",
        MASK,
        ("seen = in_reach(place, key)", "seen = key <= place"),
        ("documents_BS[b, place] == documents_BS[b, key]", "documents_BS[b, place] >= documents_BS[b, key]"),
        ("place = query + first", "place = query"),
        ("keys = mask.keys_seen(queries)", "keys = slice(1, mask.keys_seen(queries).stop)"),
    ),
    # the loss's Triton kernel
    *_of(
        "open_lm/kernels/fused_rows.py",
        "tests/kernels/test_fused_rows.py -k interpreter",
        ("1.0 + 2.0 * z_loss * log_z", "1.0 + z_loss * log_z"),
        ("total = total * tl.exp(largest - new) +", "total = total +"),
        ("scale = counted * (1.0 +", "scale = (1.0 +"),
        ("log_z * log_z * counted)", "log_z * log_z)"),
        ("        counted *= factor\n", ""),
    ),
    # float8
    *_of(
        f"{TRAIN}/float8.py",
        "tests/train/test_float8.py -k 'converted or stay or divided or width'",
        (' and not name.endswith("router")', ""),
        ("(inputs, outputs // parts) if isinstance(layer, RowsOf) else (inputs // parts, outputs)", "(inputs, outputs)"),
        ("        if isinstance(layer, RowsOf | ColumnsOf):\n", "        if isinstance(layer, RowsOf):\n"),
    ),
    # context, tensor and expert parallelism
    *_of(
        "open_lm/model/context.py",
        "tests/model/test_context.py",
        ("*reversed(pieces[1::2])", "*pieces[1::2]"),
        ("(2 * self.n_parts - 1 - self.number) * size", "(self.n_parts + self.number) * size"),
        ("documents_BS[:, : piece.stop],\n", "documents_BS[:, piece.start : piece.stop],\n"),
    ),
    *_of(
        f"{TRAIN}/tensor_parallel.py",
        f"{MESHES} -k two_ranks",
        ("_Scaled.apply(routing.balance_loss, 1 / self.parallel.size)", "routing.balance_loss"),
        ("to_local(grad_placements=[Partial()]) if whole and self.divides_positions else", "to_local() if whole and self.divides_positions else"),
        ("found_BTD * is_here_BT[..., None]", "found_BTD"),
        ("total(y.square().sum(-1, keepdim=True)) / module.dim", "y.square().sum(-1, keepdim=True) * 2 / module.dim"),
    ),
    *_of(
        "open_lm/kernels/vocabulary_parallel.py",
        f"{MESHES} -k two_ranks",
        ("part.max(logits_CV.amax(-1).float())", "logits_CV.amax(-1).float()"),
        ("index_C1, is_here_C.float()", "index_C1, None"),
    ),
    *_of(
        f"{TRAIN}/parallel.py",
        f"{MESHES} -k two_ranks",
        ("set_gradient_divide_factor(float(world.shape.n_shares))", "set_gradient_divide_factor(1.0)"),
    ),
    *_of(
        f"{TRAIN}/expert_parallel.py",
        f"{MESHES} -k two_ranks",
        ("return self._exchanged(mixed_AD[order_A.argsort()], sent, received)", "return self._exchanged(mixed_AD, sent, received)"),
    ),
    *_of("open_lm/distributed.py", "tests/train/test_meshes.py tests/commands -k 'claims or stop or sum'", ("counts = counts / self.shape.tp if", "counts = counts if")),
    # weights made part by part; hundreds of ranks; forecasts
    *_of(f"{TRAIN}/weight_shares.py", f"{MESHES} -m '' -k part_by_part", ("order.dim != dim else order.rows()", "order.dim != dim else torch.arange(n)"), ("first * shape[-1])", "0)")),
    *_of("open_lm/mesh.py", "tests/train/test_many_ranks.py", ("return self.fsdp * self.cp * self.ep", "return self.fsdp * self.cp")),
    *_of(
        "open_lm/run/kept_memory.py",
        "tests/train/test_mesh_costs.py",
        ("(two - one - 2 * hidden) / shape.tp + 2 * hidden", "(two - one) / shape.tp"),
    ),
]  # fmt: skip
