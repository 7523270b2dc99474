"""make soak: workers killed at random moments, twenty times, and the numbers are those of a run
that was left alone."""

import random
import signal
import subprocess
import time

import psutil
import pytest

from tests.launch.conftest import ROOT, without_ray
from tests.launch.test_launch import TRAIN, _losses, _uninterrupted

pytestmark = pytest.mark.slow

KILLS = 20


@pytest.mark.soak
@pytest.mark.parametrize("stage", [0, 3])
def test_killed_again_and_again(config_file, stage):
    options = ["launch.workers=2", "parallel.sp=2", "train.steps=600", "evaluate.sequences=0"]
    options += [f"deepspeed.zero_stage={stage}", "checkpoint.every=5"]
    options += [f"launch.max_failures={KILLS + 5}", "parallel.timeout_seconds=20"]
    run = config_file.parent / "run"
    moments = random.Random(stage)
    driver = subprocess.Popen(
        [*TRAIN, str(config_file), *options],
        cwd=ROOT,
        env=without_ray(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    kills = 0
    while driver.poll() is None and kills < KILLS:
        time.sleep(moments.uniform(1, 9))  # while starting, stepping or saving
        if driver.poll() is not None:
            break
        children = psutil.Process(driver.pid).children(recursive=True)
        workers = [p for p in children if "_Worker" in " ".join(p.cmdline())]
        if workers:
            moments.choice(workers).send_signal(signal.SIGKILL)
            kills += 1
    output, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, output
    assert kills >= 10, output
    assert _losses(run) == _uninterrupted(config_file, options)
    print(f"stage {stage}: {kills} kills, {len(_losses(run))} steps, all losses equal to the bit")
