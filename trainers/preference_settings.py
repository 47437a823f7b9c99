"""The settings of runs that learn from preferences."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from data.preferences import PreferenceConfig
from trainers.policy import PolicyConfig
from trainers.preference_losses import PreferenceLossConfig, RewardLossConfig
from trainers.settings import CommonConfig


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """What the policy is compared with: `checkpoint`, or null for the model as the run begins, under LoRA the base.

    With `precompute` its log-probabilities of all rows are computed before the first step and kept on disk, in
    `cache_dir`, null for the user's cache, and no copy of it is in memory while training.
    """

    checkpoint: str | None = None
    precompute: bool = False
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if self.cache_dir is not None and not self.precompute:
            raise ValueError(f"reference.cache_dir {self.cache_dir} needs precompute")


@dataclass(frozen=True, kw_only=True)
class _PairsConfig(CommonConfig):
    """What DPO and reward models have in common: `trainer.batch_size` counts rows of preferences."""

    data: PreferenceConfig
    policy: PolicyConfig = field(default_factory=PolicyConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer == "characters":
            raise ValueError("tokenizer characters is made of training text, and preferences are none: give a folder")


@dataclass(frozen=True, kw_only=True)
class DPORunConfig(_PairsConfig):
    """A run of DPO or its kin. `trainer.batch_size` counts pairs, under the loss kto single completions.

    Losses without a reference take no `reference`.
    """

    metrics: ClassVar[Mapping[str, str]] = {
        "validation/loss": "min",
        **{f"validation/rewards/{name}": "max" for name in ("accuracies", "margins", "chosen")},
    }

    loss: PreferenceLossConfig = field(default_factory=PreferenceLossConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.loss.needs_reference and self.reference != ReferenceConfig():
            raise ValueError(f"loss.name {self.loss.name} has no reference: leave the section reference out")
        if self.loss.paired:
            return
        if self.reference.precompute:
            raise ValueError(
                f"reference.precompute does not go with loss.name {self.loss.name}, whose baseline is of completions "
                "that change their prompts with every batch"
            )
        if self.trainer.batch_size < 2:
            raise ValueError(
                f"trainer.batch_size {self.trainer.batch_size} with loss.name {self.loss.name} leaves a prompt no "
                "other row's completion, of which the baseline is made: it must be at least 2"
            )


@dataclass(frozen=True, kw_only=True)
class RewardRunConfig(_PairsConfig):
    """A run of a reward model: `trainer.batch_size` counts pairs."""

    metrics: ClassVar[Mapping[str, str]] = {
        "validation/loss": "min",
        "validation/accuracy": "max",
        "validation/margin": "max",
    }

    loss: RewardLossConfig = field(default_factory=RewardLossConfig)
