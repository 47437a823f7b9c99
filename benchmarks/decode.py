"""Decoding speed beside `transformers` or tunix, and what compilation costs.

    python -m benchmarks.decode --peer hf
    python -m benchmarks.decode --device gpu --dtype bfloat16 --shapes llama-3.2-1b --batches 1,64 --bandwidth 4800

Random weights, greedy, no stop token. Each figure is the median of the runs; runs of ours and of the peer take turns,
so that a machine whose speed drifts slows both.
"""

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable

import fire
import jax
import numpy as np

from inference.completion import Request, generate
from models.llama import PRESETS, LLaMa
from models.llama.config import config_to_hf
from sampling import SamplingParams


def main(
    shapes: str = "small,smollm2-135m",
    batches: str = "1,8",
    prompt_tokens: int = 32,
    new_tokens: int = 128,
    runs: int = 5,
    peer: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    bandwidth: float | None = None,
    depths: str = "4,32",
) -> None:
    """Print a Markdown table of tokens per second, and one of compile seconds by depth.

    Args:
        shapes: Names of presets.
        batches: Batch sizes.
        prompt_tokens: Tokens in each prompt.
        new_tokens: Tokens drawn for each prompt.
        runs: Timed runs, after one that is not counted.
        peer: hf times `transformers` too, tunix its Sampler (where it is installed).
        dtype: Of the weights and the computation.
        device: cpu, gpu, tpu or auto.
        bandwidth: Of the memory, in GB/s: adds the share of it that reading the weights once for each step takes.
        depths: Layers of the `small` preset to compile decoding with; empty for none.
    """
    if device != "auto":
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(device, device))
    shapes, batches = _list(shapes), [int(b) for b in _list(batches)]
    print(f"{jax.devices()[0].device_kind}, {platform.machine()}, jax {jax.__version__}, {dtype}, ", end="")
    print(f"{prompt_tokens} + {new_tokens} tokens, median of {runs}\n")
    columns = ["shape", "batch", "compile s", "tokens/s", "GB/s of weights"]
    columns += (["of the limit"] if bandwidth else []) + ([peer, "ratio"] if peer else [])
    print("| " + " | ".join(columns) + " |\n|---|" + "---:|" * (len(columns) - 1))
    for shape in shapes:
        model = _random_model(shape, dtype)
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
        theirs = PEERS[peer](shape, dtype) if peer else None
        for batch in batches:
            prompts = np.random.default_rng(0).integers(5, model.config.vocab_size, (batch, prompt_tokens)).tolist()
            seconds = _time_in_turns(_our_decoder(model, new_tokens), theirs, prompts, new_tokens, runs)
            steps = new_tokens / seconds["ours"]
            row = [shape, batch, f"{seconds['compile']:.2f}", f"{steps * batch:.0f}", f"{steps * weights / 1e9:.1f}"]
            if bandwidth:
                row.append(f"{steps * weights / 1e9 / bandwidth:.0%}")
            if theirs:
                row += [f"{new_tokens * batch / seconds['theirs']:.0f}", f"{seconds['theirs'] / seconds['ours']:.2f}"]
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
    if depths:
        _print_compile_times([int(depth) for depth in _list(depths)], dtype)


def _list(text: str | tuple | int) -> list[str]:
    """Items of a comma-separated flag, which python-fire may have parsed already."""
    return [str(item) for item in text] if isinstance(text, tuple | list) else str(text).split(",")


def _random_model(shape: str, dtype: str, **changes) -> LLaMa:
    config = dataclasses.replace(PRESETS[shape], **changes)
    return jax.block_until_ready(jax.jit(lambda key: LLaMa(config, key=key, dtype=dtype))(jax.random.key(0)))


def _our_decoder(model: LLaMa, new_tokens: int) -> Callable[[list[list[int]]], None]:
    request = Request(max_new_tokens=new_tokens, sampling=SamplingParams(temperature=0))

    def run(prompts: list[list[int]]) -> None:
        done = list(generate(model, prompts, request, batch_size=len(prompts)))
        assert all(len(samples[0].token_ids) == new_tokens for samples in done)

    return run


def _hf_decoder(shape: str, dtype: str) -> Callable[[list[list[int]], int], None]:
    """`transformers` with a random network of the same shape, its default cache and attention."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    where = "cuda" if jax.default_backend() == "gpu" else "cpu"
    raw = config_to_hf(PRESETS[shape])
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    with torch.device(where):  # random numbers drawn there, not by one core of the host
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).to(where).eval()

    def run(prompts: list[list[int]], new_tokens: int) -> None:
        tokens = torch.tensor(prompts, device=where)
        with torch.inference_mode():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        assert out.shape[1] == len(prompts[0]) + new_tokens

    return run


def _tunix_decoder(shape: str, dtype: str) -> Callable[[list[list[int]], int], None]:
    """tunix's Sampler with its Llama of the same shape, which is float32 whatever `dtype` says."""
    from flax import nnx
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.llama3.model import Llama3, ModelConfig

    c = PRESETS[shape]
    config = ModelConfig(
        num_layers=c.num_layers,
        vocab_size=c.vocab_size,
        embed_dim=c.hidden_size,
        hidden_dim=c.intermediate_size,
        num_heads=c.num_heads,
        head_dim=c.head_dim,
        num_kv_heads=c.num_kv_heads,
        rope_theta=int(c.rope_theta),
        norm_eps=c.rms_norm_eps,
        weight_tying=c.tie_embeddings,
    )

    class Numbers:
        """A tokenizer whose texts are token ids; no id ends a text."""

        encode = staticmethod(lambda text, **_: [int(word) for word in text.split()])
        decode = staticmethod(lambda ids, **_: " ".join(map(str, ids)))
        bos_id, eos_id, pad_id = (staticmethod(lambda n=n: n) for n in (1, -1, 0))

    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with mesh:
        model = Llama3(config, rngs=nnx.Rngs(0))
    samplers: dict[int, Sampler] = {}

    def run(prompts: list[list[int]], new_tokens: int) -> None:
        length = len(prompts[0]) + 1  # it puts BOS in front
        cache = CacheConfig(length + new_tokens + 1, c.num_layers, c.num_kv_heads, c.head_dim)
        sampler = samplers.setdefault(len(prompts), Sampler(model, Numbers(), cache))
        with mesh:
            out = sampler([" ".join(map(str, p)) for p in prompts], new_tokens, max_prompt_length=length)
        assert all(len(tokens) == new_tokens for tokens in out.tokens)

    return run


PEERS = {"hf": _hf_decoder, "tunix": _tunix_decoder}


def _time_in_turns(ours, theirs, prompts, new_tokens: int, runs: int) -> dict[str, float]:
    """Median seconds of ours and theirs, and the seconds that ours spent compiling before."""
    compiled = _compile_seconds(ours, prompts)
    if theirs:
        theirs(prompts, new_tokens)
    ours_s, theirs_s = [], []
    for _ in range(runs):
        ours_s.append(_seconds(ours, prompts))
        if theirs:
            theirs_s.append(_seconds(theirs, prompts, new_tokens))
    times = {"ours": statistics.median(ours_s), "compile": compiled}
    return times | ({"theirs": statistics.median(theirs_s)} if theirs else {})


def _seconds(run: Callable, *arguments) -> float:
    started = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - started


def _compile_seconds(run: Callable, *arguments) -> float:
    """Seconds that a first run spends tracing, lowering and compiling, by jax's own clock."""
    seconds = []

    def note(event: str, duration: float, **_: object) -> None:
        if event.startswith("/jax/core/compile/"):
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        run(*arguments)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    return sum(seconds)


def _print_compile_times(depths: list[int], dtype: str) -> None:
    """Seconds to trace, lower and compile prefill and decoding of `small` cut or stretched to some depths.

    Medians of five rounds, after one that is not counted.
    """
    print("\n| layers of `small` | compile s |\n|---:|---:|")
    measured: dict[int, list[float]] = {depth: [] for depth in depths}
    for counted in (False, *[True] * 5):
        for depth in depths:
            jax.clear_caches()
            model = _random_model("small", dtype, num_layers=depth, layer_windows=(None,) * depth)
            prompts = [list(range(5, 37))]
            seconds = _compile_seconds(_our_decoder(model, 8), prompts)
            if counted:
                measured[depth].append(seconds)
    for depth in depths:
        print(f"| {depth} | {statistics.median(measured[depth]):.2f} |", flush=True)
    base = statistics.median(measured[depths[0]])
    print(f"\n{depths[-1]} layers take {statistics.median(measured[depths[-1]]) / base:.2f}x the time of {depths[0]}.")


if __name__ == "__main__":
    fire.Fire(main)
