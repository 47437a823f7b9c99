"""python -m quickstart: a small reasoner from random weights, in minutes; once more goes on where it stopped."""

import sys
from pathlib import Path

from utils import cli

RECIPES = Path(__file__).parent


def quickstart(*, output: str = "runs/quickstart", seed: int = 0, recipes: str = str(RECIPES)) -> None:
    """Take a network from random weights to a small reasoner: text, pretraining, supervised fine-tuning, GRPO.

    What is done already is left as it is, so after Ctrl-C the same command goes on.

    Args:
        output: Folder of all that is made.
        seed: Seed of the text, the weights and the draws; held-out problems are the same for all.
        recipes: Folder with corpus.yaml, pretrain.yaml, sft.yaml and grpo.yaml; by default the quickstart's own.
    """
    from quickstart.plot import check_matplotlib
    from quickstart.report import report
    from quickstart.stages import Quickstart

    check_matplotlib()
    run = Quickstart(output=Path(output), seed=seed, recipes=Path(recipes))
    run.go()
    report(run.output)


if __name__ == "__main__":
    sys.argv[0] = "quickstart"  # as which its errors are said
    cli.run(quickstart)
