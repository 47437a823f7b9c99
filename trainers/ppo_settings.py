"""The settings of a run of PPO."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from data.prompts import PromptConfig
from trainers.policy import PolicyConfig
from trainers.ppo_experience import PPOExperienceConfig
from trainers.ppo_losses import PPOLossConfig
from trainers.rewards import RewardConfig
from trainers.rollouts import RolloutConfig
from trainers.settings import CommonConfig, GRPOLogConfig


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
class PPORunConfig(CommonConfig):
    """A run of PPO: `trainer.batch_size` are the prompts of an update, `rollout.completions` those of each prompt.

    `rewards` are added up by their weights. Validation is by greedy completions; its loss is the negative reward.
    """

    metrics: ClassVar[Mapping[str, str]] = {"validation/loss": "min", "validation/reward": "max"}

    data: PromptConfig
    rewards: tuple[RewardConfig, ...]
    rollout: PPORolloutConfig
    critic: CriticConfig = field(default_factory=CriticConfig)
    experience: PPOExperienceConfig = field(default_factory=PPOExperienceConfig)
    loss: PPOLossConfig = field(default_factory=PPOLossConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    log: GRPOLogConfig = field(default_factory=GRPOLogConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rewards:
            raise ValueError("rewards is empty: there is nothing to learn from")
        if self.tokenizer == "characters":
            raise ValueError("tokenizer characters is made of training text, and prompts are none: give a folder")
