"""SRPO, GRPO and SDPO in TRL: `GRPOTrainer` with the loss of srpo_kernels.

`SRPOTrainer` is a `trl.GRPOTrainer`, not an experimental `SDPOTrainer`: the latter is a second copy of the generation
and scoring code whose interface TRL does not promise to keep, weights two losses of every sequence where SRPO routes
each sequence to one, and means over sequences alone. `GRPOTrainer` is stable and already buffers the whole generation
batch with its rewards, which is where routing, teacher contexts and exact normalizers belong. Three of its methods are
extended, `_calculate_rewards` and `_generate_and_score_completions` (who is distilled, from which sibling) and
`_prepare_inputs` (the teacher, at the start of each optimizer step), and two are replaced: `_compute_loss`, and
`_get_per_token_logps_and_entropies` (the old and the reference policy).
"""

try:
    from srpo_kernels.integrations.trl.config import SRPOTrainerConfig
    from srpo_kernels.integrations.trl.trainer import SRPOTrainer
except ImportError as error:
    raise ImportError(
        f"srpo_kernels.integrations.trl needs what pip install 'srpo-kernels[trl]' installs: {error}"
    ) from error

__all__ = ["SRPOTrainer", "SRPOTrainerConfig"]
