"""``srpo_loss``: check, run, pack."""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from srpo_kernels.api import teacher, validation
from srpo_kernels.api.types import SRPOOutput
from srpo_kernels.engine import backends, loss_op
from srpo_kernels.engine.agreement import name_of, refused_together
from srpo_kernels.engine.arguments import LossArguments, LossOptions
from srpo_kernels.losses.config import SRPOConfig
from srpo_kernels.losses.srpo import METRICS
from srpo_kernels.rollout.normalizers import Normalizers
from srpo_kernels.rows.dtypes import accumulation_dtype

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
    teacher_weight: teacher.Heads = None,
    bias: Tensor | None = None,
    teacher_bias: teacher.Heads = None,
    teacher_head_ids: Tensor | None = None,
    teacher_topk_ids: Tensor | None = None,
    teacher_topk_log_probs: Tensor | None = None,
    divergence_alpha: Tensor | None = None,
    divergence_clip: Tensor | None = None,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    is_weights: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    support_ids: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    normalizers: Normalizers | None = None,
    vocab_parallel_group: ProcessGroup | None = None,
    sequence_parallel_group: ProcessGroup | None = None,
    config: SRPOConfig = _DEFAULT_CONFIG,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> SRPOOutput:
    """The SRPO loss of a batch from its last hidden states and the LM head, without the ``[N, V]`` logits.

    ``loss = sum_policy f_t l_t + sum_sdpo f_t w_t D_t``: correct rollouts take the clipped-ratio loss ``l_t``, routed
    ones the divergence ``D_t`` from a stop-gradient self-teacher, weighted by the teacher's certainty ``w_t``; ``f_t``
    is the token's share of the one denominator. Source: arXiv 2604.02288, sections 3.1 to 3.3.

    A logit below -1e30, minus infinity among them, counts as -1e30 before the logit transform: a token that both models
    exclude adds nothing, and no path has a NaN for it; one that only the teacher excludes makes ``"reverse_kl"`` huge.

    Rows are response positions, ``[B, T]``, or packed ``[N]``; ``hidden`` at a row predicts ``target_ids`` there. Rows
    that cannot move a weight (masked ones, and policy rows with advantage 0 while ``kl_coef`` and ``entropy_coef`` are
    0) are never read. The gradients are computed in the forward: call it under ``torch.no_grad()`` for the loss alone.

    Args:
        hidden: ``[B, T, H]`` or ``[N, H]``, fp32, bf16, fp16 or fp64; carries gradient.
        weight: ``[V, H]``; carries gradient. A weight that needs none (LoRA) saves a third of the products.
        target_ids: ``[B, T]`` or ``[N]``, int64, in ``[0, V)`` wherever ``mask`` is true.
        advantages: ``[B]``, ``[B, 1]`` or ``target_ids``' shape; None only when every valid row is routed to
            distillation.
        mask: ``target_ids``' shape, bool: the valid rows. None: all.
        sdpo_mask: ``[B]`` or ``target_ids``' shape, bool: the rows to distill. None: none.
        teacher_hidden: ``target_ids``' shape + ``[H_t]``, or the routed entries of the first dimension alone, in
            order: ``[B_sdpo, T, H_t]`` (packed: ``[N_sdpo, H_t]``). Detached.
        teacher_weight: ``[V, H_t]``, detached. None: ``weight`` and ``bias``. Or a list of such heads, of several
            teachers, each None or of one H_t.
        bias: ``[V]``; carries gradient.
        teacher_bias: ``[V]``, detached; with a list of heads, a list of as many, or None.
        teacher_head_ids: ``[B]`` or ``target_ids``' shape, or the routed entries alone, integers: which head of a list
            a row's teacher has. Rows are sorted by head: those of a chunk take one matmul for each head that they have,
            and a row 4, as ever.
        teacher_topk_ids: ``target_ids``' shape + ``[K]``, or the routed entries alone, integers: the teacher's
            likeliest tokens, as an inference server returns them, in place of ``teacher_hidden``; for
            ``distillation_mode="topk"`` with ``topk_of="teacher"``, K stands for ``topk``. Distinct in a row, negative
            where there are fewer. A row then costs 3 matmuls, and the entropy that weights it is ``topk_entropy``'s.
        teacher_topk_log_probs: the shape of ``teacher_topk_ids``: the teacher's log-probs (nats) there. Detached.
        divergence_alpha: ``[B]``, ``[B, 1]`` or ``target_ids``' shape, floating: each row's own ``config.alpha``; with
            ``divergence="jsd"`` 0 makes a row's divergence forward_kl and 1 reverse_kl. None: ``config.alpha``.
        divergence_clip: likewise, in place of ``config.divergence_clip``; > 0, infinite for no bound.
        old_log_probs: ``target_ids``' shape: the sampling policy's log-probs (nats). None: the current ones.
        ref_log_probs: ``target_ids``' shape; required when ``kl_coef`` is not 0.
        is_weights: ``[B]``, ``[B, 1]`` or ``target_ids``' shape: a ready correction for a mismatched rollout engine, on
            both branches. Detached.
        rollout_log_probs: ``target_ids``' shape: log-probs (nats) as the rollout engine returned them, from which
            ``config.rollout_correction`` computes weights; with it and only then. NaN: not known. Detached.
        support_ids: ``target_ids``' shape + ``[K]``, integers: the tokens that were left to sample a policy row from,
            its top-k or top-p, distinct, negative for none. Its log-prob, ratio and entropy are then those of the
            policy over these and its own token, and so must be ``old_log_probs``, ``ref_log_probs`` and
            ``rollout_log_probs`` be. None: the whole vocabulary.
        sequence_ids: ``[N]``, integers: the sequence of a packed row. Required there for ``gspo`` and for the
            reductions ``"sequence"`` and ``"constant"``.
        normalizers: the counts of the whole optimizer batch; with them the losses of micro-batches add up to the loss
            of the whole batch. None: this call is the whole batch. A call that has all of their distillation rows warns
            (RuntimeWarning) where the mean of its entropy weights is not 1: they are then those of other logits.
        vocab_parallel_group: the process group that holds the LM head in shards of its rows, in rank order: ``weight``,
            ``bias``, ``teacher_weight`` and ``teacher_bias`` are this rank's ``[V_r, ...]`` (uneven ones too, of one
            size for student and teacher), V is their sum, all else is the same on all ranks. Loss, log-probs and
            metrics are the same to the last bit on every rank; ``hidden`` gets the whole gradient, a shard its own. On
            the wire, per row and rank: 5 numbers of a policy row, up to 13 of a fully distilled one, and H of dX; see
            docs/vocabulary_parallel.md. None: ``weight`` is the whole head.
        sequence_parallel_group: the process group whose ranks have other rows of the same sequences: what ``gspo`` and
            ``reduction="sequence"`` take over a sequence is then over its rows on all of them. A sequence is known by
            its ``sequence_ids``, or by its place in ``[B, T]``; ranks may have any number of its rows. All ranks make
            the call, one without a row too, with the same options; it needs ``normalizers``, whose ``sequence_count``
            counts a sequence once. Other losses exchange nothing. None: every sequence is whole in this call.
        config: every option of the loss.
        backend: ``"auto"`` (triton on a GPU, torch elsewhere), ``"torch"`` or ``"triton"``.
        workspace_bytes: bound of the logits of both models, and of dlogits beside them, that are alive at a time.

    Returns:
        ``loss``, a scalar in fp32 (fp64 for fp64 inputs) that carries gradient to ``hidden``, ``weight`` and ``bias``;
        ``metrics``, detached sums and counts for ``summarize_metrics``; ``log_probs`` in ``target_ids``' shape,
        detached, 0 for rows that were not computed.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value, a missing argument, or an option that is not supported; and where
            another rank of ``vocab_parallel_group`` raises.
    """
    validation.check_group(vocab_parallel_group)
    with refused_together(vocab_parallel_group, weight):
        validation.check_group(sequence_parallel_group, "sequence_parallel_group")
        validation.check_backend(backend)
        validation.check_config(config)
        validation.check_head(hidden, weight, bias)
        validation.check_target_ids(target_ids, hidden)
        validation.check_mask(mask, hidden)
        validation.check_loss_rows(
            target_ids,
            advantages=advantages,
            sdpo_mask=sdpo_mask,
            old_log_probs=old_log_probs,
            ref_log_probs=ref_log_probs,
            is_weights=is_weights,
            rollout_log_probs=rollout_log_probs,
            sequence_ids=sequence_ids,
        )
        validation.check_support_ids(support_ids, target_ids)
        validation.check_options(
            config, target_ids, old_log_probs, ref_log_probs, rollout_log_probs, sequence_ids, normalizers,
            sequence_parallel_group,
        )  # fmt: skip
        teacher.check_teacher(
            teacher_hidden, teacher_weight, teacher_bias, teacher_head_ids, weight, bias, target_ids, sdpo_mask
        )
        teacher.check_teacher_topk(
            teacher_topk_ids, teacher_topk_log_probs, teacher_hidden, target_ids, sdpo_mask, config
        )
        teacher.check_own_divergences(
            divergence_alpha,
            divergence_clip,
            target_ids,
            config.divergence,
            config.distillation_mode,
            has_teacher=sdpo_mask is not None,
        )
        dtype = accumulation_dtype(hidden, weight)
        backend = backends.resolve_backend(backend, hidden.device, dtype)
        validation.check_workspace(workspace_bytes)

    inputs = {
        "advantages": advantages,
        "old_log_probs": old_log_probs,
        "ref_log_probs": ref_log_probs,
        "is_weights": is_weights,
        "rollout_log_probs": rollout_log_probs,
        "divergence_alpha": divergence_alpha,
        "divergence_clip": divergence_clip,
    }
    given = {name: values for name, values in inputs.items() if values is not None}
    weights, biases = teacher.heads_of(teacher_weight, teacher_bias, weight, bias)
    call = LossArguments(
        hidden=hidden,
        weight=weight,
        bias=bias,
        target_ids=target_ids,
        mask=mask,
        teacher_mask=sdpo_mask,
        teacher_hidden=teacher_hidden,
        teacher_weights=weights,
        teacher_biases=biases,
        teacher_head_ids=teacher_head_ids,
        teacher_topk_ids=teacher_topk_ids,
        teacher_topk_log_probs=teacher_topk_log_probs,
        support_ids=support_ids,
        sequence_ids=sequence_ids,
        inputs=list(given.values()),
        **dict.fromkeys(Normalizers._fields) if normalizers is None else normalizers._asdict(),
    )
    groups = name_of(vocab_parallel_group), name_of(sequence_parallel_group)
    options = LossOptions("srpo", list(given), config.encode(), False, backend, workspace_bytes, *groups)
    loss, log_probs, metrics = loss_op.fused_loss(call, options)
    return SRPOOutput(loss, dict(zip(METRICS, metrics.unbind(), strict=True)), log_probs)
