"""The peer of `benchmarks.shakespeare`: a character model trained by a plain loop in torch, in a process of its own.

    python -m benchmarks.shakespeare_torch '{"text": "input.txt", "steps": 2000, ...}'

The network, the initial distribution, AdamW on matrices with decay, clipping and the learning rate are those of our
run; windows of text are drawn at random, as nanoGPT does. The last line on standard output is JSON: the cross-entropy
over the held-out text in nats per character, and the number of parameters.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a run is; fields as in our own configs. `save_to` is a file for weights and optimizer state."""

    text: str
    save_to: str
    compiled: bool
    num_layers: int
    num_heads: int
    hidden_size: int
    intermediate_size: int
    tie_embeddings: bool
    initializer_range: float
    rms_norm_eps: float
    rope_theta: float
    context: int
    batch_size: int
    steps: int
    learning_rate: float
    final_fraction: float
    warmup: int
    weight_decay: float
    b1: float
    b2: float
    eps: float
    max_grad_norm: float
    eval_every: int
    validation_fraction: float
    seed: int


class Block(nn.Module):
    """Attention over all heads and a SwiGLU layer, each behind an RMSNorm and added to the residual stream."""

    def __init__(self, s: Settings):
        super().__init__()
        D, F = s.hidden_size, s.intermediate_size
        self.num_heads = s.num_heads
        self.attention_norm, self.feed_forward_norm = (nn.RMSNorm(D, eps=s.rms_norm_eps) for _ in range(2))
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.gate_and_up, self.down = nn.Linear(D, 2 * F, bias=False), nn.Linear(F, D, bias=False)

    def forward(self, x_BTD: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        qkv_BTCNH = self.qkv(self.attention_norm(x_BTD)).view(B, T, 3, self.num_heads, -1)
        q_BNTH, k_BNTH, v_BNTH = qkv_BTCNH.permute(2, 0, 3, 1, 4)
        q_BNTH, k_BNTH = rotate(q_BNTH, cos_TH, sin_TH), rotate(k_BNTH, cos_TH, sin_TH)
        mixed_BNTH = functional.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, is_causal=True)
        x_BTD = x_BTD + self.out(mixed_BNTH.transpose(1, 2).reshape(B, T, D))
        gate_BTF, up_BTF = self.gate_and_up(self.feed_forward_norm(x_BTD)).chunk(2, dim=-1)
        return x_BTD + self.down(functional.silu(gate_BTF) * up_BTF)


def rotate(x_BNTH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Rotary embedding of the pairs (h, h + H/2). Source: arXiv:2104.09864."""
    first, second = x_BNTH.chunk(2, dim=-1)
    return x_BNTH * cos_TH + torch.cat((-second, first), dim=-1) * sin_TH


class Network(nn.Module):
    """Characters in, the mean cross-entropy of the characters behind them out."""

    def __init__(self, s: Settings, vocab_size: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, s.hidden_size)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.num_layers))
        self.norm = nn.RMSNorm(s.hidden_size, eps=s.rms_norm_eps)
        self.unembed = nn.Linear(s.hidden_size, vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=s.initializer_range)
        if s.tie_embeddings:
            self.unembed.weight = self.embed.weight
        H = s.hidden_size // s.num_heads
        frequency_P = s.rope_theta ** (-torch.arange(0, H, 2) / H)
        angle_TH = torch.outer(torch.arange(s.context), frequency_P).repeat(1, 2)
        self.register_buffer("cos_TH", angle_TH.cos())
        self.register_buffer("sin_TH", angle_TH.sin())

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        T = tokens_BT.shape[1]
        x_BTD = self.embed(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, self.cos_TH[:T], self.sin_TH[:T])
        logits_BTV = self.unembed(self.norm(x_BTD))
        return functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def main(s: Settings) -> None:
    torch.manual_seed(s.seed)
    text = Path(s.text).read_text(encoding="utf-8")
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([number[character] for character in text])
    train, held_out = tokens.split([len(tokens) - (held := round(s.validation_fraction * len(tokens))), held])

    network = Network(s, len(number))
    matrices = [p for p in network.parameters() if p.ndim > 1]
    norms = [p for p in network.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": s.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        betas=(s.b1, s.b2),
        eps=s.eps,
        fused=True,
    )
    loss_of = torch.compile(network) if s.compiled else network
    places = torch.arange(s.context + 1)
    nll = math.nan
    for step in range(s.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(s, step)
        starts = torch.randint(len(train) - s.context, (s.batch_size, 1))
        rows = train[starts + places]
        loss_of(rows[:, :-1], rows[:, 1:]).backward()
        nn.utils.clip_grad_norm_(network.parameters(), s.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % s.eval_every == 0 or step + 1 == s.steps:
            nll = evaluate(network, held_out, s.context)
            print(f"step {step + 1}: {nll:.4f} nats per character", file=sys.stderr, flush=True)
    torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict()}, s.save_to)
    print(json.dumps({"nll": nll, "parameters": sum(p.numel() for p in network.parameters())}))


def learning_rate(s: Settings, step: int) -> float:
    if step < s.warmup:
        return s.learning_rate * (step + 1) / s.warmup
    cosine = (1 + math.cos(math.pi * (step - s.warmup) / max(1, s.steps - s.warmup))) / 2
    return s.learning_rate * (s.final_fraction + (1 - s.final_fraction) * cosine)


@torch.inference_mode()
def evaluate(network: Network, tokens: Tensor, context: int) -> float:
    """Nats per character over all of the text but its first character, in windows side by side; the last is shorter."""
    last = (len(tokens) - 1) // context * context
    total = 0.0
    whole = zip(tokens[:last].view(-1, context).split(256), tokens[1 : last + 1].view(-1, context).split(256))
    for x_BT, y_BT in [*whole, (tokens[None, last:-1], tokens[None, last + 1 :])]:
        if y_BT.numel():
            total += network(x_BT, y_BT).item() * y_BT.numel()
    return total / (len(tokens) - 1)


if __name__ == "__main__":
    main(Settings(**json.loads(sys.argv[1])))
