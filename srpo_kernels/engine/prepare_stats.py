"""From the arguments of a call of ``token_stats`` to what its passes work on: flat rows and what is wanted of them."""

from __future__ import annotations

import torch

from srpo_kernels.engine import columns
from srpo_kernels.engine.arguments import StatsArguments, StatsOptions
from srpo_kernels.engine.backends import rows_of
from srpo_kernels.engine.batch import Head, Needs
from srpo_kernels.engine.memory import RowMemory
from srpo_kernels.engine.order import order_rows
from srpo_kernels.engine.prepare import derivation_of, flat_rows, per_row, position_in, row_spec, support_of
from srpo_kernels.engine.row_values import RowChecks, check_own_divergences, check_support, check_workspace
from srpo_kernels.engine.stats import StatsCall
from srpo_kernels.losses.derived import OWN
from srpo_kernels.rows.dtypes import accumulation_dtype
from srpo_kernels.rows.mixture import has_mixture
from srpo_kernels.rows.passes import RowPasses
from srpo_kernels.rows.spec import RowSpec
from srpo_kernels.rows.vocabulary import Vocabulary


def tiles(call: StatsArguments, options: StatsOptions, needs: Needs, vocabulary: Vocabulary) -> bool:
    """Whether a call runs without logits: where it has to, or where a row of them does not fit the workspace."""
    if options.engine == "rows" or (options.engine == "auto" and options.workspace_bytes is None):
        return False
    pairs = [(call.hidden, call.weight)]
    if call.teacher_hidden is not None:
        pairs.append((call.teacher_hidden, call.weight if call.teacher_weight is None else call.teacher_weight))
    obstacle, config = None, options.config()
    if options.backend != "triton":
        obstacle = f"needs the triton backend, got {options.backend!r}"
    elif any(needs):
        obstacle = "has no gradient: call it under torch.no_grad(), or with tensors that require none"
    elif call.support_ids is not None or (call.has_teacher and options.distillation_mode != "full"):
        obstacle = "does not support the log-probs of more than one token: neither support_ids nor a top-k teacher"
    elif call.teacher_hidden is not None and has_mixture(options.divergence):
        obstacle = (
            f"does not support divergence={options.divergence!r}, which takes a second look at the logits: "
            "ask for 'forward_kl' or 'reverse_kl'"
        )
    elif call.teacher_hidden is not None and (config.divergence_clip is not None or call.own_clip is not None):
        clip = " of each row" if config.divergence_clip is None else f"={config.divergence_clip!r}"
        obstacle = (
            f"does not support divergence_clip{clip}, which takes a second look at the logits: ask for engine='rows'"
        )
    elif call.teacher_hidden is not None and config.own_teacher_transform is not None:
        obstacle = "takes one logit transform for both models, got a teacher_transform of the teacher's own"
    elif len({x.dtype for pair in pairs for x in pair}) > 1:
        obstacle = f"needs one dtype for hidden states and weights, got {[x.dtype for pair in pairs for x in pair]}"
    if options.engine == "tile" and obstacle is not None:
        raise ValueError(f"engine='tile' {obstacle}")
    if options.engine == "tile" or obstacle is not None:
        return obstacle is None
    dtype = accumulation_dtype(call.hidden, call.weight)
    memory = RowMemory.of(call.weight, dtype, RowPasses(rows_of("triton"), vocabulary))
    return options.workspace_bytes is not None and options.workspace_bytes < memory.floor(len(pairs))


def prepare_stats(
    call: StatsArguments,
    options: StatsOptions,
    vocabulary: Vocabulary,
    *,
    tiled: bool = False,
    check: bool = False,
) -> StatsCall:
    """Flatten a call and find the rows to compute, ``tiled`` or from logits.

    With ``check``, raises ValueError for a target outside the vocabulary in one of them.
    """
    device, dtype = call.hidden.device, accumulation_dtype(call.hidden, call.weight)
    passes = RowPasses(rows_of(options.backend), vocabulary)
    if not tiled:
        memory = RowMemory.of(call.weight, dtype, passes)
        check_workspace(options.workspace_bytes, memory.floor(1 if call.teacher_hidden is None else 2))
    if call.target_ids is None:
        targets = torch.zeros(call.hidden.shape[:-1], dtype=torch.int64, device=device).view(-1)
    else:
        targets = call.target_ids.reshape(-1).long()
    rows = torch.arange(len(targets), device=device)
    if call.mask is not None or (check and call.target_ids is not None):
        valid = torch.ones_like(rows, dtype=torch.bool) if call.mask is None else call.mask.reshape(-1)
        nowhere = torch.zeros_like(valid)
        checked = targets if check else nowhere.long()
        checks = RowChecks.of(checked, valid, nowhere, vocabulary.size, has_teacher=True, has_advantages=True)
        rows = order_rows(valid, nowhere, None, None, 1, checks).order.alone
    config = options.config()
    given, support_ids = None, None if call.support_ids is None else flat_rows(call.support_ids).long()
    if call.teacher_topk_ids is not None and call.teacher_topk_log_probs is not None:
        given = support_of(call.teacher_topk_ids, call.teacher_topk_log_probs.to(dtype))
    for name, few in (("teacher_topk_ids", None if given is None else given.ids), ("support_ids", support_ids)):
        if check and few is not None:
            check_support(name, few[rows], vocabulary.size)
    own = {
        name: per_row(values.to(dtype), call.hidden.shape[:-1])
        for name, values in zip(OWN, (call.own_alpha, call.own_clip), strict=True)
        if values is not None
    }
    if check and own:
        valid = torch.zeros_like(targets, dtype=torch.bool).index_fill_(0, rows, True)
        check_own_divergences(own.get(OWN[0]), own.get(OWN[1]), valid, config.divergence)
    prepared = StatsCall(
        target_ids=targets,
        rows=rows,
        spec=RowSpec(config.transform, alpha=config.alpha),
        teacher_hidden=None if call.teacher_hidden is None else flat_rows(call.teacher_hidden),
        teacher_head=Head(call.weight, call.bias)
        if call.teacher_weight is None
        else Head(call.teacher_weight, call.teacher_bias),
        workspace_bytes=options.workspace_bytes,
        passes=passes,
        tiled=tiled,
        derivation=derivation_of(call, config, vocabulary),
        teacher_support=given,
        support_ids=support_ids,
        position=None if support_ids is None else position_in(support_ids, targets),
        own=own,
    )
    tokens = 0 if support_ids is None else support_ids.shape[1] + (0 if given is None else given.ids.shape[1])
    suffices = prepared.derivation.by_columns(prepared.names)
    return prepared._replace(
        spec=row_spec(call, config, vocabulary, prepared.sources),
        columns=suffices and columns.cheaper(tokens, vocabulary.size),
    )
