"""The benchmark of DPO: what its sides are told, that they do the same work, and that it runs."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import dpo
from benchmarks.comparison import Rules, Table, measure_in_turns
from benchmarks.dpo_sides import _our_batch
from benchmarks.dpo_work import END_ID, NUM_BATCHES, SETTINGS, Work
from benchmarks.peers import LOWEST_ID
from benchmarks.turns import Order, check_settings
from models.llama import PRESETS
from trainers.flops import training_flops


@pytest.fixture
def work(tmp_path) -> Work:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 50}))
    return Work(
        folder=str(tmp_path), reference=str(tmp_path / "reference"), pairs=4, prompt_tokens=6, completion_tokens=5
    )


def test_pairs_are_the_same_for_all_and_differ_by_step(work):
    batch = work.batch(0)
    assert {name: ids.shape for name, ids in batch.items()} == {"prompt": (4, 6), "chosen": (4, 5), "rejected": (4, 5)}
    for name, ids in batch.items():
        np.testing.assert_array_equal(ids, work.batch(NUM_BATCHES)[name])
        assert (ids != work.batch(1)[name]).any() and ids.max() < 50
        free = ids if name == "prompt" else ids[:, :-1]
        assert free.min() >= LOWEST_ID
    assert (batch["chosen"] != batch["rejected"]).any()
    assert (batch["chosen"][:, -1] == END_ID).all() and (batch["rejected"][:, -1] == END_ID).all()


def test_texts_are_the_ids(work):
    def ids(text: str) -> list[int]:
        return [END_ID if word == "<end>" else int(word) for word in text.split()]

    batch, texts = work.batch(2), work.texts(2)
    assert len(texts) == 4
    for b, row in enumerate(texts):
        for name, text in row.items():
            assert ids(text) == batch[name][b].tolist()
        # Side by side they are the words of both, as a tokenizer of the two together has to find them.
        assert ids(row["prompt"] + row["chosen"]) == batch["prompt"][b].tolist() + batch["chosen"][b].tolist()


def test_our_batch_has_all_of_the_pairs(work):
    batch, ids = _our_batch(work, 1), work.batch(1)
    np.testing.assert_array_equal(batch.prompts_BS, ids["prompt"])
    np.testing.assert_array_equal(batch.completions_BCM[:, 0], ids["chosen"])
    np.testing.assert_array_equal(batch.completions_BCM[:, 1], ids["rejected"])
    assert batch.mask_BCM.sum() == 4 * 2 * 5 == batch.lengths_BC.sum() and batch.weights_B.tolist() == [1] * 4


@pytest.mark.parametrize(
    ("kind", "word"), (("ours", "checkpointing"), ("trl", "shared"), ("trl", "micro2x"), ("tunix", "micro2"))
)
def test_settings_of_another_side_are_refused(kind, word):
    check_settings(kind, ("pages",), SETTINGS)
    with pytest.raises(ValueError, match=f"'{word}' is no setting of {kind}"):
        check_settings(kind, ("pages", word), SETTINGS)


def test_a_side_is_called_by_its_settings(work):
    side = dpo._side("trl", "micro2+checkpointing", work, sys.executable)
    assert side.name == "trl micro2 checkpointing" and side.order.micro() == 2
    assert dpo._side("tunix", "plain", work, sys.executable).order == Order(kind="tunix", settings=(), work=work)
    assert dpo._side("ours", "pages", work, sys.executable).name == "ropewalk pages"
    with pytest.raises(ValueError, match="4 pairs cannot be cut into micro3"):
        dpo._side("trl", "micro3", work, sys.executable)


def test_flops_are_those_of_four_forward_passes_with_each_prompt_once():
    config = PRESETS["tiny"]
    # Without a prompt, and with logits everywhere, they are those of training on the completions, a third more.
    whole = dpo.step_flops("tiny", 1, 0, 8)
    assert whole * 3 == training_flops(config, [8, 8]) * 4
    assert dpo.step_flops("tiny", 3, 0, 8) == 3 * whole
    # A prompt adds its own products, once, and that completions read it; no logits.
    logits = 2 * config.hidden_size * config.vocab_size
    prompt = training_flops(config, [6]) * 4 // 3 - 4 * 6 * logits
    reading = 4 * 2 * 8 * 6 * 4 * config.num_layers * config.num_heads * config.head_dim
    assert dpo.step_flops("tiny", 1, 6, 8) == whole + prompt + reading


class Answers:
    """A process that answers without one."""

    def __init__(self, **figures):
        self._figures = {"seconds": 1.0, "loss": 0.75, "grad_norm": 20.0} | figures

    def step(self) -> dict:
        return self._figures


@pytest.mark.parametrize("changed", ({"loss": 0.7512}, {"grad_norm": 20.03}, {"loss": 0.7488}))
def test_peers_that_do_not_do_the_same_are_not_timed(work, changed):
    trl, ours = (dpo._side(kind, "plain", work, sys.executable) for kind in ("trl", "ours"))
    step = dpo._first_step(trl, Answers(loss=0.7504, grad_norm=20.01), {})
    dpo._first_step(ours, Answers(), {"trl": step})
    with pytest.raises(ValueError, match=f"{next(iter(changed))} of ropewalk and trl differ"):
        dpo._first_step(ours, Answers(), {"trl": step | changed})


@pytest.mark.parametrize("changed", ({"loss": math.nan}, {"grad_norm": 0.0}, {"grad_norm": math.inf}))
def test_steps_without_a_loss_or_a_gradient_are_refused(work, changed):
    with pytest.raises(ValueError, match="trl has a loss of"):
        dpo._checked_step(dpo._side("trl", "plain", work, sys.executable), Answers(**changed))


def test_a_peer_that_ends_has_a_row_and_ours_has_to_work(work, capsys):
    """Without a checkpoint no side can start."""
    tunix, ours = (dpo._side(kind, "plain", work, sys.executable) for kind in ("tunix", "ours"))
    figures = measure_in_turns([tunix], 1, 1, dpo.RULES)
    assert set(figures) == {"tunix"} and "Error" in figures["tunix"]["error"]
    dpo._table(4, 0.1).add(figures)
    assert re.search(r"^\| tunix \| failed \|( +\|){5}$", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(RuntimeError, match="Error"):
        measure_in_turns([ours], 1, 1, dpo.RULES)


def test_rows_are_medians_and_ours_as_a_fraction_of_each_peer(capsys):
    table = Table(("half s",), lambda side: [f"{side['seconds'] / 2:.1f}"])
    peak = 3 * 2**30
    table.add(
        {
            "trl": {"first": 9.0, "seconds": 8.0, "peak": peak},
            "trl pages": {"first": 9.0, "seconds": 4.0, "peak": None},
            "ropewalk": {"first": 5.0, **dpo._sum_up([{"seconds": s, "peak": peak} for s in (9.0, 2.0, 1.0)])},
        }
    )
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| trl | 9.0 | 8.000 | 4.0 | 3.00 | 0.25x |",
        "| trl pages | 9.0 | 4.000 | 2.0 |  | 0.50x (its fastest) |",
        "| ropewalk | 5.0 | 2.000 | 1.0 | 3.00 |  |",
    ]


def test_rules_are_followed_in_the_order_of_sides(work, monkeypatch):
    asked = []

    class Silent:
        def __init__(self, side, checks):
            asked.append((side.name, list(checks)))

        def close(self):
            asked.append("closed")

    monkeypatch.setattr("benchmarks.comparison.Process", Silent)
    sides = [dpo._side(kind, "plain", work, sys.executable) for kind in ("trl", "tunix", "ours")]
    count = iter(range(100))
    rules = Rules(
        checks=lambda firsts: [{"of": name} for name in firsts],
        first_step=lambda side, process, firsts: {"seconds": float(next(count))},
        step=lambda side, process: {"number": next(count)},
        sum_up=lambda taken: {"numbers": [step["number"] for step in taken]},
    )
    figures = measure_in_turns(sides, 2, 3, rules)
    assert asked[:3] == [("trl", []), ("tunix", []), ("ropewalk", [{"of": "trl"}, {"of": "tunix"}])]
    assert asked[3:] == ["closed"] * 3
    # Three first steps, two more that warm up, in turns, and two that count.
    assert figures["trl"] == {"first": 0.0, "numbers": [9, 12]}
    assert figures["ropewalk"] == {"first": 2.0, "numbers": [11, 14]}


@pytest.mark.slow
def test_a_step_is_timed_beside_trl(repo_root):
    pytest.importorskip("trl")
    sizes = ("--shape", "tiny", "--pairs", "4", "--prompt_tokens", "6", "--completion_tokens", "5")
    flags = (*sizes, "--peer", "trl", "--trl", "plain,micro2+checkpointing", "--ours", "plain,repeated+micro1")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.dpo", *flags, "--rounds", "1"], cwd=repo_root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines][2:]
    assert [row[0] for row in rows] == ["trl", "trl micro2 checkpointing", "ropewalk", "ropewalk repeated micro1"]
    for row in rows:
        assert float(row[3]) == pytest.approx(4 / float(row[2]), rel=0.1)
    assert [row[6].endswith("x (its fastest)") for row in rows[:2]].count(True) == 1 and rows[2][6] == ""
    losses = set(re.findall(r"loss (0\.\d+)", "\n".join(line for line in done.stderr.splitlines() if ": " in line)))
    assert losses and f"{math.log(2):.4f}" not in losses  # that of a policy that is its reference
