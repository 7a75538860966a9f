"""``token_stats`` and ``teacher_stats``: check, run, pack."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from srpo_kernels.api import teacher, validation
from srpo_kernels.api.types import TeacherStats, TokenStats
from srpo_kernels.checks import FLOATING, require_shape, require_tensor
from srpo_kernels.engine import backends, stats_op
from srpo_kernels.engine.agreement import name_of, refused_together
from srpo_kernels.engine.arguments import StatsArguments, StatsOptions
from srpo_kernels.losses.config import UNSET, SRPOConfig, Unset, resolve_options
from srpo_kernels.losses.options import require_mixture
from srpo_kernels.rows.dtypes import accumulation_dtype
from srpo_kernels.rows.spec import LOWEST, LogitTransform
from srpo_kernels.rows.sums import bucket_entropy

# Of a config alone: what models are compared at.
_COMPARED = ("distillation_mode", "topk", "topk_of", "add_tail", "divergence_clip")


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
    teacher_topk_ids: Tensor | None = None,
    teacher_topk_log_probs: Tensor | None = None,
    support_ids: Tensor | None = None,
    divergence_alpha: Tensor | None = None,
    divergence_clip: Tensor | None = None,
    config: SRPOConfig | None = None,
    divergence: str | Unset = UNSET,
    alpha: float | Unset = UNSET,
    temperature: float | Unset = UNSET,
    logit_scale: float | Unset = UNSET,
    softcap: float | Unset | None = UNSET,
    teacher_transform: LogitTransform | Unset | None = UNSET,
    vocab_parallel_group: ProcessGroup | None = None,
    backend: str = "auto",
    engine: str = "auto",
    workspace_bytes: int | None = None,
) -> TokenStats:
    """Log-prob, entropy, divergence and log-sum-exp of every row, differentiable, for any loss of your own.

    ``log_probs = log p_t``, ``entropy = H(p)``, ``divergence`` the configured one between student p and teacher q over
    the whole vocabulary, ``teacher_entropy = H(q)``, ``logsumexp = log sum_v exp z_v``; all in nats. No logits are kept
    for the backward, which computes them again for the rows whose upstream gradients are not all 0. A row costs 1
    matmul forward and 3 backward, one more each with ``teacher_hidden``.

    Args:
        hidden: ``[..., H]``, fp32, bf16, fp16 or fp64; carries gradient.
        weight: ``[V, H]``; carries gradient.
        target_ids: ``[...]``, int64, in ``[0, V)`` wherever ``mask`` is true.
        mask: ``[...]``, bool: rows to compute; the others are never read and are 0 in every output. None: all.
        teacher_hidden: ``[..., H_t]``, detached. None: no divergence.
        teacher_weight: ``[V, H_t]``, detached. None: ``weight`` and ``bias``.
        bias: ``[V]``; carries gradient.
        teacher_bias: ``[V]``, detached.
        teacher_topk_ids: ``[..., K]``, integers: the teacher's likeliest tokens in place of ``teacher_hidden``, as in
            ``srpo_loss``. ``divergence`` compares at them and at the rest as one more token, or as a ``config`` with
            ``distillation_mode="topk"`` and ``topk_of="teacher"`` says; ``teacher_entropy`` is ``topk_entropy``'s.
        teacher_topk_log_probs: ``[..., K]``: the teacher's log-probs (nats) there. Detached.
        support_ids: ``[..., S]``, integers: the tokens that were left to sample a row from, its top-k or top-p,
            distinct, negative for none; ``pad_support`` makes them of lists. ``log_probs``, ``entropy`` and
            ``logsumexp`` are then those of the policy over these and the row's own token. Without a teacher, or with
            ``teacher_topk_ids`` and no tail, a row costs ``2 (S + 1) H`` FLOP forward and 3 times that backward where
            the head has 32 rows or more for each token. None: the whole vocabulary.
        divergence_alpha: ``[B]``, ``[B, 1]`` or ``target_ids``' shape, floating: each row's own ``alpha``; with jsd in
            [0, 1], where 0 is forward_kl and 1 reverse_kl. Detached. None: ``alpha``.
        divergence_clip: likewise, in place of the config's ``divergence_clip``; > 0, infinite for no bound.
        config: the loss's options, in place of the next six, which are its fields, and of how models are compared: its
            ``distillation_mode``, ``topk``, ``topk_of``, ``add_tail`` and ``divergence_clip``. With the mode
            ``"sampled"`` ``divergence`` is ``sg(log p_t - log q_t) log p_t``, which has reverse KL's gradient in
            expectation. None: the next six.
        divergence: ``"forward_kl"`` (KL(q || p)), ``"reverse_kl"`` (KL(p || q)), or one from a mixture of both
            models, ``"jsd"``, ``"skew_forward_kl"`` or ``"skew_reverse_kl"``, as in ``SRPOConfig``. Unset: jsd.
        alpha: the share of one model in that mixture, as in ``SRPOConfig``, in (0, 1). Unset: 0.5.
        temperature: divides the logits. Unset: 1.
        logit_scale: multiplies the logits, before the softcap. Unset: 1.
        softcap: bounds the logits to ``softcap * tanh(logits / softcap)``. Unset or None: no bound.
        teacher_transform: the ``LogitTransform`` of a teacher that has another one, as in ``SRPOConfig``. Unset or
            None: the three above.
        vocab_parallel_group: the process group that holds the LM head in shards, as in ``srpo_loss``: statistics are
            the same to the last bit on every rank, and their upstream gradients must be the same too. On the wire, per
            row and rank: 5 numbers, up to 13 with a teacher, and H of dX in the backward.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.
        engine: ``"rows"`` holds the logits of some rows at a time; ``"tile"`` holds none: projection and reductions in
            one kernel, whose results for a row are the same to the last bit in any batch. It has no gradient, no
            divergence from a mixture, no ``divergence_clip`` and no ``teacher_transform``, and needs the triton backend
            and one dtype for hidden states and weight.
            ``"auto"``: rows, or tile where it can run and a row of logits does not fit ``workspace_bytes``.
        workspace_bytes: bound of the logits of both models, and of dlogits beside them, that are alive at a time.

    Returns:
        ``log_probs``, ``entropy``, ``divergence``, ``teacher_entropy`` and ``logsumexp``, each ``[...]`` in fp32 (fp64
        for fp64 inputs). All but the teacher's carry gradient; ``divergence`` and ``teacher_entropy`` are None without
        a teacher.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value, or an option that is not supported.
    """
    validation.check_group(vocab_parallel_group)
    with refused_together(vocab_parallel_group, weight):
        validation.check_backend(backend)
        validation.check_engine(engine)
        described = resolve_options(
            config,
            divergence=divergence,
            alpha=alpha,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            teacher_transform=teacher_transform,
        )
        own = described.pop("teacher_transform")
        require_mixture(described["divergence"], described["alpha"])
        if config is None and teacher_topk_ids is not None:
            described |= {"distillation_mode": "topk", "topk_of": "teacher"}
        elif config is not None:
            described |= {name: getattr(config, name) for name in _COMPARED}
        validation.check_head(hidden, weight, bias)
        validation.check_target_ids(target_ids, hidden)
        validation.check_mask(mask, hidden)
        validation.check_support_ids(support_ids, target_ids)
        teacher.check_stats_teacher(teacher_hidden, teacher_weight, teacher_bias, hidden, weight, bias)
        teacher.check_teacher_topk(
            teacher_topk_ids, teacher_topk_log_probs, teacher_hidden, target_ids, target_ids, config
        )
        teacher.check_own_divergences(
            divergence_alpha,
            divergence_clip,
            target_ids,
            described["divergence"],
            described.get("distillation_mode", "full"),
            has_teacher=teacher_hidden is not None or teacher_topk_ids is not None,
        )
        if teacher_topk_ids is not None:
            width = teacher_topk_ids.shape[-1:]
            require_shape("teacher_topk_ids", teacher_topk_ids, [target_ids.shape + width], "the rows of hidden, and K")
        dtype = accumulation_dtype(hidden, weight)
        backend = backends.resolve_backend(backend, hidden.device, dtype)
        validation.check_workspace(workspace_bytes)
    call = StatsArguments(
        hidden, weight, bias, target_ids, mask, teacher_hidden, teacher_weight, teacher_bias, teacher_topk_ids,
        teacher_topk_log_probs, support_ids, divergence_alpha, divergence_clip,
    )  # fmt: skip
    options = StatsOptions(
        **described,
        teacher_transform=None if own is None else [x for x in own if x is not None],
        backend=backend,
        engine=engine,
        workspace_bytes=workspace_bytes,
        vocab_parallel_group=name_of(vocab_parallel_group),
    )
    result = stats_op.token_stats(call, options)
    logsumexp = result.logsumexp.to(dtype)
    if not call.has_teacher:
        return TokenStats(result.log_probs, result.entropy, None, None, logsumexp)
    return TokenStats(result.log_probs, result.entropy, result.divergence, result.teacher_entropy, logsumexp)


def teacher_stats(
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    mask: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    config: SRPOConfig | None = None,
    temperature: float | Unset = UNSET,
    logit_scale: float | Unset = UNSET,
    softcap: float | Unset | None = UNSET,
    vocab_parallel_group: ProcessGroup | None = None,
    backend: str = "auto",
    engine: str = "auto",
    workspace_bytes: int | None = None,
) -> TeacherStats:
    """Entropy and log-sum-exp of a teacher's rows, without gradient: what ``Normalizers.from_batch`` needs.

    ``entropy = H(q)`` over the whole vocabulary (nats) and ``logsumexp`` of the transformed logits.

    Args:
        teacher_hidden: ``[..., H_t]``, fp32, bf16, fp16 or fp64.
        teacher_weight: ``[V, H_t]``.
        mask: ``[...]``, bool: rows to compute; the others are never read and are 0. None: all.
        teacher_bias: ``[V]``.
        config: the loss's options, in place of the next three: its fields, or where the teacher has a transform of its
            own, those of its ``teacher_transform``. None: the next three.
        temperature: divides the logits. Unset: 1.
        logit_scale: multiplies the logits, before the softcap. Unset: 1.
        softcap: bounds the logits to ``softcap * tanh(logits / softcap)``. Unset or None: no bound.
        vocab_parallel_group: the process group that holds ``teacher_weight`` and ``teacher_bias`` in shards, as in
            ``srpo_loss``. On the wire, per row and rank: 5 numbers.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.
        engine: ``"auto"``, ``"rows"`` or ``"tile"``, as in ``token_stats``.
        workspace_bytes: bound of the logits that are alive at a time.

    Returns:
        ``entropy`` and ``logsumexp``, each ``[...]`` in fp32 (fp64 for fp64 inputs), detached.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value, or an option that is not supported.
    """
    validation.check_group(vocab_parallel_group)
    with refused_together(vocab_parallel_group, teacher_weight):
        validation.check_backend(backend)
        validation.check_engine(engine)
        described = resolve_options(config, temperature=temperature, logit_scale=logit_scale, softcap=softcap)
        if config is not None and config.teacher_transform is not None:
            described = config.teacher_transform._asdict()
        validation.check_head(
            teacher_hidden, teacher_weight, teacher_bias, ("teacher_hidden", "teacher_weight", "teacher_bias")
        )
        validation.check_mask(mask, teacher_hidden, "the rows of teacher_hidden")
        dtype = accumulation_dtype(teacher_hidden, teacher_weight)
        backend = backends.resolve_backend(backend, teacher_hidden.device, dtype)
        validation.check_workspace(workspace_bytes)
    hidden, weight = teacher_hidden.detach(), teacher_weight.detach()
    bias = None if teacher_bias is None else teacher_bias.detach()
    result = stats_op.token_stats(
        StatsArguments(hidden, weight, bias, target_ids=None, mask=mask),
        StatsOptions(
            **described,
            backend=backend,
            engine=engine,
            workspace_bytes=workspace_bytes,
            vocab_parallel_group=name_of(vocab_parallel_group),
        ),
    )
    return TeacherStats(result.entropy, result.logsumexp.to(dtype))


def topk_entropy(log_probs: Tensor) -> Tensor:
    """What the entropy of rows is at least, from the log-probs of their likeliest tokens.

    ``-sum_k q_k log q_k - r log r``, ``r = 1 - sum_k q_k``: the entropy with one bucket for all other tokens; it can be
    larger by ``r log(V - K)``. ``srpo_loss`` weights the rows of a teacher's top-k by it; give it to
    ``Normalizers.from_batch`` too.

    Args:
        log_probs: ``[..., K]``, nats; minus infinity for none.

    Returns:
        ``[...]``, nats, in fp32 (fp64 for fp64 inputs), detached.

    Raises:
        TypeError: no floating tensor.
        ValueError: no dimension of tokens.
    """
    log_probs = require_tensor("log_probs", log_probs, FLOATING).detach()
    if not log_probs.ndim:
        raise ValueError("log_probs must have shape [..., K], got []")
    return bucket_entropy(log_probs.to(torch.promote_types(log_probs.dtype, torch.float32)).clamp_min(LOWEST))
