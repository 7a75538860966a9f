"""``fused_loss``: a loss of one's own on the engine of ``srpo_loss``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from srpo_kernels.api import teacher, validation
from srpo_kernels.api.types import FusedOutput
from srpo_kernels.engine import backends, loss_op
from srpo_kernels.engine.agreement import name_of, refused_together
from srpo_kernels.engine.arguments import NORMALIZERS, LossArguments, LossOptions
from srpo_kernels.losses.config import SRPOConfig
from srpo_kernels.losses.registry import policy_loss_of
from srpo_kernels.losses.rows import ObjectiveRows
from srpo_kernels.rows.dtypes import accumulation_dtype

_DEFAULT_CONFIG = SRPOConfig()


def fused_loss(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    objective: Callable[[ObjectiveRows], Tensor] | str,
    *,
    inputs: Mapping[str, Tensor] | None = None,
    mask: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: teacher.Heads = None,
    teacher_mask: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: teacher.Heads = None,
    teacher_head_ids: Tensor | None = None,
    teacher_topk_ids: Tensor | None = None,
    teacher_topk_log_probs: Tensor | None = None,
    support_ids: Tensor | None = None,
    divergence_alpha: Tensor | None = None,
    divergence_clip: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    whole_sequences: bool = False,
    vocab_parallel_group: ProcessGroup | None = None,
    sequence_parallel_group: ProcessGroup | None = None,
    config: SRPOConfig = _DEFAULT_CONFIG,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> FusedOutput:
    """A loss of your own from the last hidden states and the LM head, at the price of ours: without ``[N, V]`` logits.

    ``loss = sum over valid rows of objective(row)``. The objective is a function on vectors: ``rows.log_probs``,
    ``rows.entropy``, ``rows.divergence``, ``rows.forward_kl``, ``rows.reverse_kl`` and ``rows.logsumexp`` ``[n]`` carry
    gradient, ``rows.teacher_entropy`` and ``rows.teacher_log_probs`` do not, the ``inputs`` are there by their names,
    and it returns the losses ``[n]``. It is called for one chunk of rows after another, and autograd through it gives
    what the engine spreads over the vocabulary: 3 matmuls per row, 4 per row with a teacher of which something is read.
    Statistics that it does not read are not computed; to see which those are, it is first called on one row with
    made-up ones. Divide by a count of tokens yourself, of the whole optimizer batch, so that micro-batches add up.

    ``rows.divergence`` is the one that ``config`` describes, with its ``distillation_mode``: over the whole vocabulary,
    over the ``topk`` likeliest tokens of a model, or at the row's own token, where it is ``sg(log p_t - log q_t) log
    p_t``: its gradient is reverse KL's in expectation, its value is not. With ``support_ids`` the policy is the one
    over the tokens that a row was sampled from: ``rows.log_probs``, ``rows.entropy`` and ``rows.logsumexp`` are its
    own; ``rows.full_log_probs``, ``rows.full_entropy`` and ``rows.full_logsumexp`` are those of the whole vocabulary,
    and so is the divergence.

    A row's loss must not depend on other rows: chunks are cut anywhere, and nothing can tell. With ``whole_sequences``
    it may depend on those of its sequence: ``rows.sequence_mean`` and ``rows.sequence_sum`` take values over it, on
    all ranks that have rows of it.

    Args:
        hidden: ``[B, T, H]`` or ``[N, H]``, fp32, bf16, fp16 or fp64; carries gradient.
        weight: ``[V, H]``; carries gradient.
        target_ids: ``[B, T]`` or ``[N]``, int64, in ``[0, V)`` wherever ``mask`` is true.
        objective: the function, which must not change its rows in place; or the name of a policy loss, as in
            ``SRPOConfig.loss_type``, of the inputs ``advantages`` and ``old_log_probs`` (None: the current ones), with
            the options of a ``config`` that has that ``loss_type``. A compiled graph takes a name alone.
        inputs: tensors by name, ``[B]`` or ``target_ids``' shape. Floating ones come in the statistics' dtype. None
            carries gradient. A name of a statistic is refused.
        mask: ``target_ids``' shape, bool: the valid rows; the others are never read. None: all.
        teacher_hidden: ``target_ids``' shape + ``[H_t]``, or the entries of the first dimension that ``teacher_mask``
            marks alone, in order. Detached.
        teacher_weight: ``[V, H_t]``, detached. None: ``weight`` and ``bias``. Or a list of such heads, of several
            teachers, each None or of one H_t.
        teacher_mask: ``[B]`` or ``target_ids``' shape, bool: the rows that have a teacher, ``rows.has_teacher``; in
            the others what is read of one is 0. None: all, where ``teacher_hidden`` is given.
        bias: ``[V]``; carries gradient.
        teacher_bias: ``[V]``, detached; with a list of heads, a list of as many, or None.
        teacher_head_ids: ``[B]`` or ``target_ids``' shape, or the marked entries alone, integers: which head of a list
            a row's teacher has. Rows are sorted by head: those of a chunk take one matmul for each head that they have,
            and a row 4, as ever.
        teacher_topk_ids: ``target_ids``' shape + ``[K]``, or the entries that ``teacher_mask`` marks alone: the
            teacher's likeliest tokens in place of ``teacher_hidden``, as in ``srpo_loss``, with ``distillation_mode=
            "topk"`` and ``topk_of="teacher"``. ``rows.divergence`` compares at them, ``rows.teacher_entropy`` is
            ``topk_entropy``'s, and ``rows.teacher_log_probs`` is refused. A row costs 3 matmuls.
        teacher_topk_log_probs: the shape of ``teacher_topk_ids``: the teacher's log-probs (nats) there. Detached.
        support_ids: ``target_ids``' shape + ``[S]``, integers: the tokens that were left to sample a row from, its
            top-k or top-p, distinct, negative for none; ``pad_support`` makes them of lists. The row's own token
            belongs to them. Rows of which nothing else is read, but for a teacher's ``teacher_topk_ids`` without a
            tail, cost ``6 (S + 1) H`` FLOP where the head has 32 rows or more for each token; others 3 matmuls.
        divergence_alpha: ``[B]``, ``[B, 1]`` or ``target_ids``' shape, floating: each row's own ``config.alpha``; with
            ``divergence="jsd"`` 0 makes a row's divergence forward_kl and 1 reverse_kl. None: ``config.alpha``.
        divergence_clip: likewise, in place of ``config.divergence_clip``; > 0, infinite for no bound.
        sequence_ids: ``[N]``, integers: the sequence of a packed row, for ``whole_sequences``.
        whole_sequences: each call of the objective has all valid rows of a sequence. Rows of a sequence that does not
            fit the workspace are computed twice.
        vocab_parallel_group: the process group that holds the LM head in shards, as in ``srpo_loss``.
        sequence_parallel_group: the process group whose ranks have other rows of the same sequences, for
            ``whole_sequences``; as in ``srpo_loss``.
        config: its logit transform, ``divergence``, ``alpha``, ``divergence_clip``, ``distillation_mode``, ``topk``,
            ``topk_of`` and ``add_tail`` are read, and by a named policy loss its options.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.
        workspace_bytes: bound of the logits of both models, and of dlogits beside them, that are alive at a time.

    Returns:
        ``loss``, a scalar in fp32 (fp64 for fp64 inputs) that carries gradient to ``hidden``, ``weight`` and ``bias``;
        ``log_probs`` and ``losses``, each row's, in ``target_ids``' shape, detached, 0 for masked rows.

    Raises:
        TypeError: an argument of the wrong type or dtype, or an objective that returns none of the right kind.
        ValueError: a wrong shape, device or value; and an objective that changes its rows, returns another number of
            losses, carries no gradient to a statistic, depends on a tensor that expects a gradient, or is NaN where
            the statistics are finite.
    """
    validation.check_group(vocab_parallel_group)
    inputs = {} if inputs is None else inputs
    with refused_together(vocab_parallel_group, weight):
        validation.check_group(sequence_parallel_group, "sequence_parallel_group")
        validation.check_backend(backend)
        validation.check_config(config)
        validation.check_head(hidden, weight, bias)
        validation.check_target_ids(target_ids, hidden)
        validation.check_mask(mask, hidden)
        validation.check_objective(objective, inputs)
        validation.check_inputs(inputs, target_ids)
        if isinstance(objective, str):
            whole_sequences = whole_sequences or policy_loss_of(objective).whole_sequences
        validation.check_whole_sequences(whole_sequences, target_ids, sequence_ids, sequence_parallel_group)
        validation.check_support_ids(support_ids, target_ids)
        known = teacher_topk_ids if teacher_hidden is None else teacher_hidden
        teacher.check_teacher_mask(teacher_mask, known, target_ids)
        if known is not None and teacher_mask is None:
            teacher_mask = torch.ones_like(target_ids, dtype=torch.bool)
        teacher.check_teacher_topk(
            teacher_topk_ids, teacher_topk_log_probs, teacher_hidden, target_ids, teacher_mask, config, "teacher_mask"
        )
        teacher.check_teacher(
            teacher_hidden, teacher_weight, teacher_bias, teacher_head_ids, weight, bias, target_ids, teacher_mask,
            "teacher_mask",
        )  # fmt: skip
        teacher.check_own_divergences(
            divergence_alpha,
            divergence_clip,
            target_ids,
            config.divergence,
            config.distillation_mode,
            has_teacher=teacher_mask is not None,
        )
        dtype = accumulation_dtype(hidden, weight)
        backend = backends.resolve_backend(backend, hidden.device, dtype)
        validation.check_workspace(workspace_bytes)

    own = {"divergence_alpha": divergence_alpha, "divergence_clip": divergence_clip}
    inputs = {**inputs, **{name: values for name, values in own.items() if values is not None}}
    weights, biases = teacher.heads_of(teacher_weight, teacher_bias, weight, bias)
    call = LossArguments(
        hidden=hidden,
        weight=weight,
        bias=bias,
        target_ids=target_ids,
        mask=mask,
        teacher_mask=teacher_mask,
        teacher_hidden=teacher_hidden,
        teacher_weights=weights,
        teacher_biases=biases,
        teacher_head_ids=teacher_head_ids,
        teacher_topk_ids=teacher_topk_ids,
        teacher_topk_log_probs=teacher_topk_log_probs,
        support_ids=support_ids,
        sequence_ids=sequence_ids,
        inputs=list(inputs.values()),
        **dict.fromkeys(NORMALIZERS),
    )
    groups = name_of(vocab_parallel_group), name_of(sequence_parallel_group)
    options = LossOptions(objective, list(inputs), config.encode(), whole_sequences, backend, workspace_bytes, *groups)
    return FusedOutput(*loss_op.fused_loss(call, options))
