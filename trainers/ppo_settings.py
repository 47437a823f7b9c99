"""The settings of a run of PPO."""

from dataclasses import dataclass, field
from typing import Literal

from trainers.ppo_experience import PPOExperienceConfig
from trainers.ppo_losses import PPOLossConfig
from trainers.rollouts import RolloutConfig
from trainers.settings import RewardedRunConfig


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """What values the policy's states: a `head` on its own hidden states, or a `separate` network with one.

    `checkpoint` is the separate network's, such as a reward model's folder; by default it is that of the policy, and
    its head starts at zero, as that of a policy does.
    """

    kind: Literal["head", "separate"] = "head"
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        if self.checkpoint is not None and self.kind != "separate":
            raise ValueError(f"critic.checkpoint {self.checkpoint} is for critic.kind separate, not {self.kind}")


@dataclass(frozen=True, kw_only=True)
class PPORolloutConfig(RolloutConfig):
    """As for GRPO, with one completion of each prompt by default: the critic is what it is compared with."""

    completions: int = 1


@dataclass(frozen=True, kw_only=True)
class PPORunConfig(RewardedRunConfig):
    """A run of PPO."""

    rollout: PPORolloutConfig
    critic: CriticConfig = field(default_factory=CriticConfig)
    experience: PPOExperienceConfig = field(default_factory=PPOExperienceConfig)
    loss: PPOLossConfig = field(default_factory=PPOLossConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora is not None and self.lora.dropout:
            raise ValueError(
                f"lora.dropout {self.lora.dropout} would make the policy another one than that of the rollout, whose "
                "log-probabilities and values have none: PPO goes without"
            )
