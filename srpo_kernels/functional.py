"""The public functions: validate, flatten, plan, run."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from srpo_kernels import backends, validation
from srpo_kernels.config import SRPOConfig
from srpo_kernels.engine import ops, stats
from srpo_kernels.engine.batch import Batch, Head, Needs
from srpo_kernels.engine.gemm import accumulation_dtype
from srpo_kernels.engine.plan import RowMemory, make_plan, order_rows
from srpo_kernels.objective import RowInputs
from srpo_kernels.rows import RowSpec
from srpo_kernels.types import Normalizers, SRPOOutput, TeacherStats, TokenStats

_DEFAULT_CONFIG = SRPOConfig()


def srpo_loss(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    advantages: Tensor | None = None,
    mask: Tensor | None = None,
    sdpo_mask: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    is_weights: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    normalizers: Normalizers | None = None,
    vocab_parallel_group: ProcessGroup | None = None,
    config: SRPOConfig = _DEFAULT_CONFIG,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> SRPOOutput:
    """The SRPO loss of a batch from its last hidden states and the LM head, without the ``[N, V]`` logits.

    ``loss = sum_policy f_t l_t + sum_sdpo f_t w_t D_t``: correct rollouts take the clipped-ratio loss ``l_t``, routed
    ones the divergence ``D_t`` from a stop-gradient self-teacher, weighted by the teacher's certainty ``w_t``; ``f_t``
    is the token's share of the one denominator. Source: arXiv 2604.02288, sections 3.1 to 3.3.

    Rows are response positions, ``[B, T]``, or packed ``[N]``; ``hidden`` at a row predicts ``target_ids`` there. Rows
    that cannot move a weight (masked ones, and policy rows with advantage 0 while ``kl_coef`` and ``entropy_coef`` are
    0) are never read. The gradients are computed in the forward: call it under ``torch.no_grad()`` for the loss alone.

    Args:
        hidden: ``[B, T, H]`` or ``[N, H]``, fp32, bf16, fp16 or fp64; carries gradient.
        weight: ``[V, H]``; carries gradient. A weight that needs none (LoRA) saves a third of the products.
        target_ids: ``[B, T]`` or ``[N]``, int64, in ``[0, V)`` wherever ``mask`` is true.
        advantages: ``[B]`` or ``target_ids``' shape; None only when every valid row is routed to distillation.
        mask: ``target_ids``' shape, bool: the valid rows. None: all.
        sdpo_mask: ``[B]`` or ``target_ids``' shape, bool: the rows to distill. None: none.
        teacher_hidden: ``target_ids``' shape + ``[H_t]``, or the routed entries of the first dimension alone, in
            order: ``[B_sdpo, T, H_t]`` (packed: ``[N_sdpo, H_t]``). Detached.
        teacher_weight: ``[V, H_t]``, detached. None: ``weight`` and ``bias``.
        bias: ``[V]``; carries gradient.
        teacher_bias: ``[V]``, detached.
        old_log_probs: ``target_ids``' shape: the sampling policy's log-probs (nats). None: the current ones.
        ref_log_probs: ``target_ids``' shape; required when ``kl_coef`` is not 0.
        is_weights: ``target_ids``' shape: correction for a mismatched rollout engine, on both branches. Detached.
        sequence_ids: ``[N]``, integers: the sequence of a packed row. Required there for ``gspo`` and for the
            reductions ``"sequence"`` and ``"constant"``.
        normalizers: the counts of the whole optimizer batch; with them the losses of micro-batches add up to the loss
            of the whole batch. None: this call is the whole batch.
        vocab_parallel_group: not in this version; must be None.
        config: every option of the loss.
        backend: ``"auto"`` or ``"torch"``.
        workspace_bytes: bound of the logits that are alive at a time, of both models together.

    Returns:
        ``loss``, a scalar in fp32 (fp64 for fp64 inputs) that carries gradient to ``hidden``, ``weight`` and ``bias``;
        ``metrics``, detached sums and counts for ``summarize_metrics``; ``log_probs`` in ``target_ids``' shape,
        detached, 0 for rows that were not computed.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value, a missing argument, or an option that is not supported.
    """
    validation.check_backend(backend)
    validation.check_config(config)
    validation.check_no_vocab_parallel(vocab_parallel_group)
    validation.check_head(hidden, weight, bias)
    validation.check_target_ids(target_ids, hidden)
    validation.check_mask(mask, target_ids)
    validation.check_loss_rows(
        target_ids,
        advantages=advantages,
        sdpo_mask=sdpo_mask,
        old_log_probs=old_log_probs,
        ref_log_probs=ref_log_probs,
        is_weights=is_weights,
        sequence_ids=sequence_ids,
    )
    validation.check_options(config, target_ids, ref_log_probs, sequence_ids, normalizers)
    validation.check_teacher(teacher_hidden, teacher_weight, teacher_bias, weight, bias, sdpo_mask)
    dtype = accumulation_dtype(hidden, weight)
    models = 1 if sdpo_mask is None else 2
    passes = backends.row_passes(backends.resolve_backend(backend, hidden.device, dtype))
    memory = RowMemory.of(weight, dtype, passes)
    validation.check_workspace(workspace_bytes, memory.floor(models))

    shape, device = target_ids.shape, target_ids.device
    targets = target_ids.reshape(-1)
    valid = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask.reshape(-1)
    routed = torch.zeros_like(valid) if sdpo_mask is None else _per_row(sdpo_mask, shape)
    row_advantages = targets.new_zeros(len(targets), dtype=dtype)
    if advantages is not None:
        row_advantages = _per_row(advantages.detach().to(dtype), shape)
    validation.check_row_values(
        targets,
        valid,
        routed,
        len(weight),
        has_teacher=teacher_hidden is not None,
        has_advantages=advantages is not None,
    )
    teacher_rows = torch.arange(len(targets), device=device)
    if teacher_hidden is not None and sdpo_mask is not None:
        teacher_rows = _teacher_rows(teacher_hidden, sdpo_mask, target_ids)

    sequences, num_sequences = _number_sequences(target_ids, sequence_ids, valid, config)
    inputs = RowInputs(
        row_advantages,
        _flat(old_log_probs, dtype),
        _flat(ref_log_probs, dtype),
        _flat(is_weights, dtype),
        sequences,
        num_sequences,
    )
    head = Head(weight, bias)
    batch = Batch(
        hidden=hidden.reshape(-1, hidden.shape[-1]),
        head=head,
        target_ids=targets.long(),
        inputs=inputs,
        factors=_factors(valid, sequences, num_sequences, normalizers, config, dtype),
        log_mean=_log_mean(normalizers, config, dtype, device),
        teacher_hidden=None if teacher_hidden is None else teacher_hidden.detach().flatten(0, -2),
        teacher_rows=teacher_rows,
        teacher_head=_teacher_head(head, teacher_weight, teacher_bias),
    )
    order = order_rows(valid, routed, row_advantages, sequences, num_sequences, config)
    lengths = None
    if config.loss_type == "gspo" and sequences is not None:
        lengths = torch.bincount(sequences[order.policy], minlength=num_sequences).tolist()
    needs = _needs(hidden, head)
    plan = make_plan(
        order,
        lengths,
        config,
        memory=memory,
        workspace_bytes=workspace_bytes,
        gradients=int(needs.hidden) + int(needs.weight),
        log_mean_known=batch.log_mean is not None,
    )
    loss, log_probs, metrics = ops.fused_loss(batch, plan, config, needs, passes)
    return SRPOOutput(loss, metrics, log_probs.view(shape))


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    mask: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    divergence: str = "jsd",
    alpha: float = 0.5,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_parallel_group: ProcessGroup | None = None,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> TokenStats:
    """Log-prob, entropy and divergence of every row as differentiable tensors, for any loss of your own.

    ``log_probs = log p_t``, ``entropy = H(p)``, ``divergence`` the configured one between student p and teacher q over
    the whole vocabulary, ``teacher_entropy = H(q)``; all in nats. Only the statistics are kept for the backward, which
    computes logits again, slice by slice of the vocabulary, for the rows whose upstream gradients are not all 0.

    Args:
        hidden: ``[..., H]``, fp32, bf16, fp16 or fp64; carries gradient.
        weight: ``[V, H]``; carries gradient.
        target_ids: ``[...]``, int64, in ``[0, V)`` wherever ``mask`` is true.
        mask: ``[...]``, bool: rows to compute; the others are never read and are 0 in every output. None: all.
        teacher_hidden: ``[..., H_t]``, detached. None: no divergence.
        teacher_weight: ``[V, H_t]``, detached. None: ``weight`` and ``bias``.
        bias: ``[V]``; carries gradient.
        teacher_bias: ``[V]``, detached.
        divergence: ``"jsd"``, ``"forward_kl"`` (KL(q || p)) or ``"reverse_kl"`` (KL(p || q)).
        alpha: the teacher's share in the mixture of jsd, in (0, 1).
        temperature: divides the logits.
        logit_scale: multiplies the logits, before the softcap.
        softcap: bounds the logits to ``softcap * tanh(logits / softcap)``. None: no bound.
        vocab_parallel_group: not in this version; must be None.
        backend: ``"auto"`` or ``"torch"``.
        workspace_bytes: bound of the logits that are alive at a time, of both models together.

    Returns:
        ``log_probs``, ``entropy``, ``divergence`` and ``teacher_entropy``, each ``[...]`` in fp32 (fp64 for fp64
        inputs). The first three carry gradient; the last two are None without a teacher.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value, or an option that is not supported.
    """
    validation.check_backend(backend)
    validation.check_no_vocab_parallel(vocab_parallel_group)
    validation.check_transform(temperature, logit_scale, softcap)
    validation.check_divergence(divergence, alpha)
    validation.check_head(hidden, weight, bias)
    validation.check_target_ids(target_ids, hidden)
    validation.check_mask(mask, target_ids)
    validation.check_stats_teacher(teacher_hidden, teacher_weight, teacher_bias, hidden, weight, bias)
    models = 1 if teacher_hidden is None else 2
    dtype = accumulation_dtype(hidden, weight)
    passes = backends.row_passes(backends.resolve_backend(backend, hidden.device, dtype))
    validation.check_workspace(workspace_bytes, RowMemory.of(weight, dtype, passes).floor(models))
    targets = target_ids.reshape(-1)
    rows = _rows_to_compute(mask, targets)
    nowhere = torch.zeros_like(targets, dtype=torch.bool)
    valid = nowhere.index_fill(0, rows, True)
    validation.check_row_values(targets, valid, nowhere, len(weight), has_teacher=True, has_advantages=True)

    head = Head(weight, bias)
    call = stats.StatsCall(
        target_ids=targets.long(),
        rows=rows,
        spec=RowSpec(
            divergence=None if teacher_hidden is None else divergence,
            alpha=alpha,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
        ),
        teacher_hidden=None if teacher_hidden is None else teacher_hidden.detach().flatten(0, -2),
        teacher_head=_teacher_head(head, teacher_weight, teacher_bias),
        workspace_bytes=workspace_bytes,
        passes=passes,
    )
    outputs = ops.token_stats(hidden.reshape(-1, hidden.shape[-1]), head, call, _needs(hidden, head))
    return TokenStats._make(None if x is None else _spread(x, rows, target_ids.shape) for x in outputs)


def teacher_stats(
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    mask: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_parallel_group: ProcessGroup | None = None,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> TeacherStats:
    """Entropy and log-sum-exp of a teacher's rows, without gradient: what ``Normalizers.from_batch`` needs.

    ``entropy = H(q)`` over the whole vocabulary (nats) and ``logsumexp`` of the transformed logits.

    Args:
        teacher_hidden: ``[..., H_t]``, fp32, bf16, fp16 or fp64.
        teacher_weight: ``[V, H_t]``.
        mask: ``[...]``, bool: rows to compute; the others are never read and are 0. None: all.
        teacher_bias: ``[V]``.
        temperature: divides the logits.
        logit_scale: multiplies the logits, before the softcap.
        softcap: bounds the logits to ``softcap * tanh(logits / softcap)``. None: no bound.
        vocab_parallel_group: not in this version; must be None.
        backend: ``"auto"`` or ``"torch"``.
        workspace_bytes: bound of the logits that are alive at a time.

    Returns:
        ``entropy`` and ``logsumexp``, each ``[...]`` in fp32 (fp64 for fp64 inputs), detached.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value, or an option that is not supported.
    """
    validation.check_backend(backend)
    validation.check_no_vocab_parallel(vocab_parallel_group)
    validation.check_transform(temperature, logit_scale, softcap)
    validation.check_head(
        teacher_hidden, teacher_weight, teacher_bias, ("teacher_hidden", "teacher_weight", "teacher_bias")
    )
    shape = teacher_hidden.shape[:-1]
    targets = torch.zeros(shape, dtype=torch.int64, device=teacher_hidden.device)
    validation.check_mask(mask, targets)
    dtype = accumulation_dtype(teacher_hidden, teacher_weight)
    passes = backends.row_passes(backends.resolve_backend(backend, teacher_hidden.device, dtype))
    validation.check_workspace(workspace_bytes, RowMemory.of(teacher_weight, dtype, passes).floor(1))
    rows = _rows_to_compute(mask, targets.reshape(-1))
    head = Head(teacher_weight.detach(), None if teacher_bias is None else teacher_bias.detach())
    spec = RowSpec(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    call = stats.StatsCall(targets.reshape(-1), rows, spec, None, head, workspace_bytes, passes)
    with torch.no_grad(), torch.autocast(teacher_hidden.device.type, enabled=False):
        result = stats.forward(teacher_hidden.detach().flatten(0, -2), head, call)
        assert result.entropy is not None
        logsumexp = result.logsumexp.squeeze(1).to(dtype)
        return TeacherStats(_spread(result.entropy, rows, shape), _spread(logsumexp, rows, shape))


def _needs(hidden: Tensor, head: Head) -> Needs:
    grad = torch.is_grad_enabled()
    return Needs(*(grad and x is not None and x.requires_grad for x in (hidden, *head)))


def _teacher_head(head: Head, teacher_weight: Tensor | None, teacher_bias: Tensor | None) -> Head:
    weight, bias = head if teacher_weight is None else (teacher_weight, teacher_bias)
    return Head(weight.detach(), None if bias is None else bias.detach())


def _flat(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if values is None else values.detach().to(dtype).reshape(-1)


def _per_row(values: Tensor, shape: torch.Size) -> Tensor:
    """Values per sequence ``[B]`` or per row, flattened to one per row."""
    return (values if values.shape == shape else values[:, None].expand(shape)).reshape(-1)


def _teacher_rows(teacher_hidden: Tensor, sdpo_mask: Tensor, target_ids: Tensor) -> Tensor:
    """Where each row's teacher state is: at the row itself, or in the routed entries alone."""
    routed = sdpo_mask.flatten(1).any(1) if sdpo_mask.ndim == 2 else sdpo_mask
    rows = torch.arange(target_ids.numel(), device=target_ids.device)
    if teacher_hidden.shape[:-1] == target_ids.shape:
        return rows
    validation.check_teacher_rows(teacher_hidden, target_ids, int(routed.sum()))
    length = target_ids.shape[1] if target_ids.ndim == 2 else 1
    rank = routed.long().cumsum(0) - 1
    return rank.repeat_interleave(length) * length + rows % max(length, 1)


def _number_sequences(
    target_ids: Tensor, sequence_ids: Tensor | None, valid: Tensor, config: SRPOConfig
) -> tuple[Tensor | None, int]:
    """The sequence of every row, numbered from 0, and how many there are, at least 1; None where it is not needed."""
    if config.loss_type != "gspo" and config.reduction == "token":
        return None, 0
    if sequence_ids is None:
        count, length = target_ids.shape
        return torch.arange(count, device=target_ids.device).repeat_interleave(length), max(count, 1)
    known, numbers = torch.unique(sequence_ids[valid], return_inverse=True)
    return torch.zeros_like(sequence_ids, dtype=torch.int64).masked_scatter(valid, numbers), max(len(known), 1)


def _factors(
    valid: Tensor,
    sequences: Tensor | None,
    num_sequences: int,
    normalizers: Normalizers | None,
    config: SRPOConfig,
    dtype: torch.dtype,
) -> Tensor:
    """Each row's share of the loss, ``[N]``: one over the reduction's denominator."""
    ones = torch.ones_like(valid, dtype=dtype)
    if config.reduction == "token" or sequences is None:
        tokens = valid.sum() if normalizers is None else normalizers.token_count
        return ones / tokens.to(ones).clamp_min(1.0)
    count = ones.new_tensor(num_sequences)
    if normalizers is not None and normalizers.sequence_count is not None:
        count = normalizers.sequence_count.to(ones)
    count = count.clamp_min(1.0)
    if config.reduction == "constant" and config.max_length is not None:
        return ones / (count * config.max_length)
    lengths = torch.bincount(sequences[valid], minlength=num_sequences).to(ones).clamp_min(1.0)
    return 1.0 / (count * lengths[sequences])


def _log_mean(
    normalizers: Normalizers | None, config: SRPOConfig, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """The log-mean of the entropy weights where it is known: every weight is 1 when ``dw_beta`` is 0."""
    if config.dw_beta == 0.0:
        return torch.zeros((), dtype=dtype, device=device)
    return None if normalizers is None else normalizers.dw_log_mean.to(device, dtype)


def _rows_to_compute(mask: Tensor | None, targets: Tensor) -> Tensor:
    if mask is None:
        return torch.arange(len(targets), device=targets.device)
    return mask.reshape(-1).nonzero().squeeze(1)


def _spread(values: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    """Values of ``rows`` in the shape of all rows, 0 elsewhere."""
    flat = values if len(rows) == shape.numel() else values.new_zeros(shape.numel()).index_put((rows,), values)
    return flat.view(shape)
