"""Losses on any causal language model of transformers, from token ids: see docs/own_loop.md.

`response_loss` is `srpo_loss` with the positions, the shift, the LM head and the logit transform of the model that it
is given; `check_model` holds them to the model's own logits.
"""

try:
    from srpo_kernels.integrations.transformers.check import check_model
    from srpo_kernels.integrations.transformers.head import (
        Head,
        config_for,
        head_operands,
        logit_transform,
    )
    from srpo_kernels.integrations.transformers.hidden import call_with_hidden, causal_model, last_hidden_states
    from srpo_kernels.integrations.transformers.loss import response_loss
    from srpo_kernels.integrations.transformers.statistics import (
        TeacherRows,
        response_normalizers,
        response_stats,
        teacher_rows,
    )
    from srpo_kernels.integrations.transformers.teacher import AverageTeacher
except ImportError as error:
    raise ImportError(
        f"srpo_kernels.integrations.transformers needs transformers, pip install 'srpo-kernels[transformers]': {error}"
    ) from error

__all__ = [
    "AverageTeacher",
    "Head",
    "TeacherRows",
    "call_with_hidden",
    "causal_model",
    "check_model",
    "config_for",
    "head_operands",
    "last_hidden_states",
    "logit_transform",
    "response_loss",
    "response_normalizers",
    "response_stats",
    "teacher_rows",
]
