"""The settings of a run of distillation."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from data.datasets import DataConfig
from data.prompts import PromptConfig
from trainers.distillation import DistillConfig
from trainers.rollouts import RolloutConfig
from trainers.settings import CommonConfig


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The network that is learnt from: a checkpoint with the student's vocabulary, which stays as it is.

    `dtype` is what it is kept and run in, "auto" for that in which the run computes.
    """

    checkpoint: str
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ValueError("checkpoint is empty")


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig:
    """Learning from the student's own completions of prompts, in a `share` of the steps.

    Such a step has `trainer.batch_size` completions, `rollout.completions` of each prompt.
    """

    share: float
    prompts: PromptConfig
    rollout: RolloutConfig

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share {self.share} must be above 0 and at most 1")
        if self.prompts.validation or self.prompts.validation_fraction:
            raise ValueError("prompts.validation and prompts.validation_fraction have no use: data is validated on")

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt with the longest completion."""
        return self.prompts.max_prompt_length + self.rollout.max_completion_length


@dataclass(frozen=True, kw_only=True)
class DistillRunConfig(CommonConfig):
    """A run of distillation. `learn` says whether of chats, and of prompts with completions, answers alone are learnt.

    All of plain text is learnt. Validation is of the student on `data`.
    """

    metrics: ClassVar[Mapping[str, str]] = {
        **{f"validation/{name}": "min" for name in ("loss", "divergence", "nll", "perplexity", "entropy")},
        "validation/accuracy": "max",
    }

    data: DataConfig
    teacher: TeacherConfig
    loss: DistillConfig = field(default_factory=DistillConfig)
    learn: Literal["answers", "all"] = "answers"
    on_policy: OnPolicyConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer == "characters":
            raise ValueError("tokenizer characters is made anew of the training text: give the teacher's, a folder")
        if self.on_policy is None:
            return
        completions = self.on_policy.rollout.completions
        if self.trainer.batch_size % completions:
            raise ValueError(
                f"trainer.batch_size {self.trainer.batch_size} is not a multiple of on_policy.rollout.completions "
                f"{completions}: it is made of the completions of whole prompts"
            )
