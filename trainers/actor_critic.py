"""A policy with a critic, which says what its states are worth: one module to be trained, in one forward pass."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.llama import LLaMa, LlamaConfig
from models.llama.scalar import HeadParam, ScalarLLaMa
from trainers.policy import Completions, PolicyConfig, completion_states, log_probs_behind
from utils.shapes import Array


class ActorCritic(nnx.Module):
    """A policy, and what values its states: `value_D`, a head on its own hidden states, or `critic`, another network.

    Of networks of two kinds `config` is the policy's.
    """

    def __init__(self, policy: LLaMa, *, value_D: Array | None = None, critic: ScalarLLaMa | None = None):
        """Raises ValueError where there is not one of the two, and for a critic of another vocabulary."""
        if (value_D is None) == (critic is None):
            raise ValueError("a policy is valued by a head or by a critic of its own: give one of them")
        if critic is not None and critic.config.vocab_size != policy.config.vocab_size:
            raise ValueError(
                f"a critic of {critic.config.vocab_size} token ids cannot read the policy's {policy.config.vocab_size}"
            )
        self.policy = policy
        self.value_D = None if value_D is None else HeadParam(value_D.astype(jnp.float32))
        self.critic = critic

    @property
    def config(self) -> LlamaConfig:
        return self.policy.config


class Judged(NamedTuple):
    """What is known of each token of completions; float32, nats but for the values.

    A value is that of the state that its token is drawn in.
    """

    logprobs_BT: Array
    entropy_BT: Array
    values_BT: Array


def judge(
    model: ActorCritic, batch: Completions, *, temperature: float, config: PolicyConfig, key: Array | None = None
) -> Judged:
    """Log-probabilities and entropies as in `trainers.policy.completion_log_probs`, and values, all [N, M]."""
    keys = (None, None) if key is None else jax.random.split(key)
    x_NPD = completion_states(model.policy, batch, config=config, key=keys[0])
    found = log_probs_behind(x_NPD, model.policy, batch, temperature=temperature)
    if model.critic is not None:
        y_NPD = completion_states(model.critic.llama, batch, config=config, key=keys[1])
        return Judged(*found, model.critic.scores(y_NPD[:, :-1]))
    x_NMD, precision = x_NPD[:, :-1].astype(jnp.float32), jax.lax.Precision.HIGHEST
    return Judged(*found, jnp.einsum("NMD,D->NM", x_NMD, model.value_D[...], precision=precision))
