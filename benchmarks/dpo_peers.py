"""TRL's and tunix's sides of `benchmarks.dpo`: their own trainers in their own loops, told when to go on."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.dpo_work import BETA, END_ID, NUM_BATCHES, Work
from benchmarks.peers import (
    BETAS,
    EPSILON,
    LEARNING_RATE,
    MAX_NORM,
    tunix_adamw,
    tunix_mesh,
    tunix_network,
    word_tokenizer,
)
from benchmarks.turns import Order, Turns, peak_resident_bytes


def trl_side(order: Order, turns: Turns) -> None:
    """TRL's trainer, whose own loop it is; a turn ends where a step's metrics are logged."""
    import torch
    import transformers
    import trl

    work = order.work
    transformers.logging.set_verbosity_error()
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        for folder in (work.folder, work.reference)
    )

    class Steps(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.wait()

        def on_log(self, *_: Any, logs: dict, **__: Any) -> None:
            figures = {"loss": logs["loss"], "grad_norm": logs["grad_norm"]}
            turns.done(seconds=turns.elapsed(), **figures, peak=peak_resident_bytes())
            turns.wait()

    trainer = trl.DPOTrainer(
        policy,
        ref_model=reference,
        args=_trl_config(order),
        train_dataset=_trl_pairs(work),
        processing_class=word_tokenizer(policy.config.vocab_size, end=END_ID),
        callbacks=[Steps()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


def _trl_config(order: Order) -> Any:
    import trl

    work, micro = order.work, order.micro()
    return trl.DPOConfig(
        output_dir=work.folder,
        max_steps=10**6,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=work.pairs // micro,
        train_sampling_strategy="sequential",
        max_length=None,
        loss_type=["sigmoid"],
        beta=BETA,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPSILON,
        weight_decay=0.0,
        max_grad_norm=MAX_NORM,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing="checkpointing" in order.settings,
        torch_compile="compiled" in order.settings,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def _trl_pairs(work: Work) -> Any:
    """A row for each pair."""
    import datasets

    return datasets.Dataset.from_list([row for step in range(NUM_BATCHES) for row in work.texts(step)])


def tunix_side(order: Order, turns: Turns) -> None:
    """tunix's trainer, whose own loop it is; a turn ends where it asks for the next pairs."""
    import jax
    from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput

    work, mesh = order.work, tunix_mesh()
    config = DPOTrainingConfig(beta=BETA, eval_every_n_steps=10**6)
    policy, reference = (tunix_network(folder, mesh) for folder in (work.folder, work.reference))
    trainer = DPOTrainer(policy, reference, tunix_adamw(), config)
    figures: dict[str, Any] = {}
    buffer_metrics = trainer._buffer_metrics

    def note_metrics(buffer: Any, loss: Any, step: int, additional_metrics: dict) -> Any:
        figures.update(loss=loss, grad_norm=additional_metrics["grad_norm"][0])
        return buffer_metrics(buffer, loss, step, additional_metrics)

    trainer._buffer_metrics = note_metrics

    def batches() -> Iterator[TrainingInput]:
        for step in itertools.count():
            turns.wait()
            ids = work.batch(step)
            arrays = {f"{name}_ids": rows for name, rows in ids.items()}
            yield TrainingInput(**arrays, **{f"{name}_mask": np.ones_like(rows) for name, rows in ids.items()})
            jax.block_until_ready(jax.tree.leaves(policy))
            numbers = {name: float(number) for name, number in figures.items()}
            turns.done(seconds=turns.elapsed(), **numbers, peak=peak_resident_bytes())

    with jax.set_mesh(mesh):
        trainer.train(batches())
