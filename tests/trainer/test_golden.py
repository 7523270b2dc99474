"""Golden losses of the debug configurations: a change of the numbers must be meant."""

from pathlib import Path

import pytest

from tests.trainer.runs import figures, run

CONFIGS = Path(__file__).parents[2] / "configs"
GOLDEN = {
    "debug_mingru": [
        5.54401,
        5.43337,
        5.22315,
        4.94472,
        4.61152,
        4.25266,
        3.92773,
        3.59144,
        3.2757,
        2.96558,
    ],
    "debug_minlstm": [
        5.6409,
        5.5352,
        5.32223,
        5.04846,
        4.73787,
        4.39614,
        4.06819,
        3.71777,
        3.38231,
        3.05489,
    ],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_first_losses_of_the_debug_configuration(name, dataset, tmp_path):
    """Ten steps on the tests' pseudo-text, which is the same on every machine.

    1e-4 relative leaves room for other processors' matrix products, amplified over ten steps.
    """
    options = [f"data.path={dataset}", f"run.dir={tmp_path / 'run'}", "train.stop_after=10"]
    events = run(CONFIGS / f"{name}.yaml", 2, *options)
    losses = [loss for loss, _ in figures(events)]
    assert losses == pytest.approx(GOLDEN[name], rel=1e-4)
