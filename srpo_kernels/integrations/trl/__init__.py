"""SRPO, GRPO and SDPO in TRL: `GRPOTrainer` with the loss of srpo_kernels.

`SRPOTrainer` is a `trl.GRPOTrainer`, not an experimental `SDPOTrainer`: the latter is a second copy of the generation
and scoring code whose interface TRL does not promise to keep, weights two losses of every sequence where SRPO routes
each sequence to one, and means over sequences alone. `GRPOTrainer` is stable and already buffers the whole generation
batch with its rewards, which is where routing, teacher contexts and exact normalizers belong. `routing` extends what
scores completions (`_calculate_rewards`, `_generate_and_score_completions`), `steps` what prepares and computes a step
(`_prepare_inputs`, `_compute_loss`, and log-probs), `trainer` the constructor and checkpoints.
"""

try:
    from srpo_kernels.integrations.trl.config import SRPOTrainerConfig
    from srpo_kernels.integrations.trl.trainer import SRPOTrainer
except ImportError as error:
    raise ImportError(
        f"srpo_kernels.integrations.trl needs what pip install 'srpo-kernels[trl]' installs: {error}"
    ) from error

__all__ = ["SRPOTrainer", "SRPOTrainerConfig"]
