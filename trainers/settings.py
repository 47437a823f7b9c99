"""The settings of a run, as YAML files and flags give them: a section for each owner."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from data.datasets import DataConfig
from data.prompts import PromptConfig
from data.row_sources import RowsConfig
from models.llama.lora import LoraConfig
from trainers.checkpoints import CheckpointConfig
from trainers.experience import ExperienceConfig
from trainers.language_model import LanguageModelConfig
from trainers.logs import WandbOptions
from trainers.optimizers import OptimizerConfig
from trainers.policy import PolicyConfig
from trainers.policy_losses import PolicyLossConfig
from trainers.rewards import RewardConfig
from trainers.rollouts import RolloutConfig
from utils.sharding import AXES


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where the network comes from: a `checkpoint` to go on from, or a `preset` with random weights.

    `changes` replace fields of the preset's LlamaConfig; its vocabulary is the tokenizer's unless changed. `dtype` is
    that of the parameters: float32 to train them; bfloat16 saves memory where they are frozen, under adapters.
    """

    checkpoint: str | None = None
    preset: str | None = None
    changes: dict[str, int | float | bool | str] = field(default_factory=dict)
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.preset is None):
            raise ValueError(
                f"give checkpoint or preset and null for the other, not {self.checkpoint!r} and {self.preset!r}"
            )
        if self.changes and self.preset is None:
            raise ValueError(f"changes {', '.join(self.changes)} are for a preset; a checkpoint is as it is")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long, how fast and how wide a run is.

    `steps` or `epochs` of `batch_size` rows, over all devices, each in `accumulation_steps` micro-batches.
    `learning_rate` is the peak. Every `eval_every` steps and at the end, and before the first with `eval_at_start`, up
    to `eval_batches` micro-batches of the validation data are evaluated; training ends after `patience` evaluations
    without a lower loss, or `max_bad_steps` steps in a row that are not finite. Other fields as in
    `trainers.trainer.Trainer`.
    """

    batch_size: int
    learning_rate: float
    steps: int | None = None
    epochs: float | None = None
    accumulation_steps: int = 1
    max_grad_norm: float | None = 1.0
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = 0
    log_every: int = 10
    eval_every: int = 500
    eval_at_start: bool = False
    eval_batches: int | None = None
    patience: int | None = None
    max_bad_steps: int = 10

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give steps or epochs and null for the other, not {self.steps} and {self.epochs}")
        for name in (
            *("batch_size", "learning_rate", "steps", "epochs", "accumulation_steps", "max_grad_norm", "log_every"),
            *("eval_every", "eval_batches", "patience", "max_bad_steps"),
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, not {self.seed}")
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of accumulation_steps {self.accumulation_steps}"
            )


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh, see `utils.sharding`; -1 along at most one of them takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor, self.sequence)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"axes are positive, and one of them may be -1; not {', '.join(AXES)} = {sizes}")

    def shape(self, num_devices: int) -> tuple[int, int, int, int]:
        """Sizes of the axes in their order. Raises ValueError where they do not make up all of the devices."""
        sizes = (self.data, self.fsdp, self.tensor, self.sequence)
        known = 1
        for size in sizes:
            known *= size if size > 0 else 1
        if num_devices % known or (-1 not in sizes and known != num_devices):
            shape = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
            raise ValueError(f"a mesh of {shape} does not fit {num_devices} devices")
        return tuple(num_devices // known if size == -1 else size for size in sizes)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where metrics go besides metrics.jsonl, and how progress is shown on standard error."""

    tensorboard: bool = False
    wandb: WandbOptions | None = None
    progress: Literal["auto", "bar", "lines", "silent"] = "auto"


@dataclass(frozen=True, kw_only=True)
class GRPOLogConfig(LogConfig):
    """The completions of every `completions_every` steps, null: none, `completions_shown` of them in a table.

    All of them are written to completions.jsonl.
    """

    completions_every: int | None = 25
    completions_shown: int = 4

    def __post_init__(self) -> None:
        if self.completions_every is not None and self.completions_every < 1:
            raise ValueError(f"completions_every must be at least 1, or null, not {self.completions_every}")
        if self.completions_shown < 0:
            raise ValueError(f"completions_shown must be at least 0, not {self.completions_shown}")


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """What the runs of all algorithms have.

    `tokenizer` is a folder or file, by default the checkpoint's. All that the run makes is in `output_dir`.
    """

    # Metrics of a validation, by which of two values the better one is found.
    metrics: ClassVar[Mapping[str, str]]
    _tokenizers: ClassVar[str] = "a folder or a file"

    output_dir: str
    model: ModelConfig
    data: DataConfig | RowsConfig
    trainer: TrainerConfig
    tokenizer: str | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig | None = None
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every_steps=500, keep_last=2))
    mesh: MeshConfig = field(default_factory=MeshConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("output_dir is empty")
        if self.tokenizer is None and self.model.checkpoint is None:
            raise ValueError(f"a model with random weights needs a tokenizer: {self._tokenizers}")
        if self.model.dtype != "float32" and self.lora is None:
            raise ValueError(f"model.dtype {self.model.dtype} loses small updates: train parameters in float32")
        if self.optimizer.name == "muon" and self.lora is not None:
            raise ValueError("optimizer.name muon is for the weights of the blocks, which lora leaves as they are")
        self._check_validation()

    def _check_validation(self) -> None:
        """Raise ValueError where something that waits for a validation would never see one."""
        trainer, checkpoint = self.trainer, self.checkpoint
        validated = bool(self.data.validation or self.data.validation_fraction)
        for name in ("patience", "eval_at_start"):
            if getattr(trainer, name) and not validated:
                raise ValueError(f"trainer.{name} {getattr(trainer, name)} needs data to validate on")
        if checkpoint.metric is None:
            if checkpoint.mode != "min":
                raise ValueError(f"checkpoint.mode {checkpoint.mode} needs a checkpoint.metric to go by")
            return
        if not validated or checkpoint.metric not in self.metrics:
            known = ", ".join(self.metrics)
            raise ValueError(f"checkpoint.metric {checkpoint.metric!r} is none of a validation's: {known}")
        if checkpoint.mode != (mode := self.metrics[checkpoint.metric]):
            raise ValueError(
                f"checkpoint.mode {checkpoint.mode} would keep the worst by {checkpoint.metric}: it must be {mode}"
            )
        if checkpoint.every_steps % trainer.eval_every:
            raise ValueError(
                f"checkpoint.every_steps {checkpoint.every_steps} is not a multiple of trainer.eval_every "
                f"{trainer.eval_every}: checkpoints would be kept by a metric that they do not have"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig(CommonConfig):
    """A run of pretraining or supervised fine-tuning.

    `tokenizer` is a folder or file, by default the checkpoint's; "characters" makes one of the training text. All that
    the run makes is in `output_dir`.
    """

    metrics: ClassVar[Mapping[str, str]] = {
        **{f"validation/{name}": "min" for name in ("loss", "nll", "perplexity", "entropy")},
        "validation/accuracy": "max",
    }
    _tokenizers = "a folder, a file, or characters"

    data: DataConfig
    loss: LanguageModelConfig = field(default_factory=LanguageModelConfig)


@dataclass(frozen=True, kw_only=True)
class RewardedRunConfig(CommonConfig):
    """A run that learns from rewards of its own completions: `trainer.batch_size` are the prompts of an update,
    `rollout.completions` those of each prompt.

    `rewards` are added up by their weights. Validation is by greedy completions; its loss is the negative reward.
    """

    metrics: ClassVar[Mapping[str, str]] = {"validation/loss": "min", "validation/reward": "max"}

    data: PromptConfig
    rewards: tuple[RewardConfig, ...]
    rollout: RolloutConfig
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    log: GRPOLogConfig = field(default_factory=GRPOLogConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rewards:
            raise ValueError("rewards is empty: there is nothing to learn from")
        if self.tokenizer == "characters":
            raise ValueError("tokenizer characters is made of training text, and prompts are none: give a folder")


@dataclass(frozen=True, kw_only=True)
class GRPORunConfig(RewardedRunConfig):
    """A run of GRPO."""

    experience: ExperienceConfig = field(default_factory=ExperienceConfig)
    loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollout.completions < 2:
            raise ValueError(
                f"rollout.completions {self.rollout.completions} leaves nothing to compare a completion with"
            )
