"""In bf16: what is added up is added up in fp32, or told."""

import pytest

from tests.trainer.runs import figures, run, warnings

HYBRID = ("model.mixer=[mingru,window]", "model.window=10")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_a_streamed_run_in_bf16_is_the_whole_one_to_rounding(config_file, stage):
    """Carries stay fp32; the halo's gradient is rounded as it is within a sequence.

    And of 96 backwards as of 3: the gradients of weights are added in fp32. (In bf16 the norm is
    off by 1 %.)
    """
    options = [*HYBRID, "train.dtype=bf16", f"deepspeed.zero_stage={stage}", "parallel.sp=2"]
    small = ["model.window=4", "train.batch_size=4", "train.steps=2", "optim.clip=0"]
    for more, length, near in (([], 78, 5e-3), (small, 8, 1e-3)):
        found = []
        for name, cut in (("whole", 192), ("cut", length)):
            folder = f"run.dir={config_file.parent / f'{name}-{length}'}"
            options_here = [*options, *more, f"train.segment_len={cut}", folder]
            found.append(figures(run(config_file, 2, *options_here)))
        for got, want in zip(*found, strict=True):
            assert got == pytest.approx(want, rel=near)


@pytest.mark.slow
def test_a_sum_in_bf16_is_told(config_file):
    """At stage 1 alone: DeepSpeed's, which cannot be made another there."""
    for stage, told in ((0, 0), (1, 1), (2, 0)):
        options = ["train.dtype=bf16", "train.segment_len=4", f"deepspeed.zero_stage={stage}"]
        options += ["train.steps=1", "evaluate.sequences=0", f"run.dir={config_file}-{stage}"]
        said = warnings(run(config_file, 1, *options))
        assert sum("in bf16, which is off by a percent" in message for message in said) == told
