"""What DeepSpeed is told, which of its defaults is changed, and why."""

from typing import Any

from models.flops import parameters
from trainer.config import Config


def deepspeed_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's own dictionary, derived from ours and never written by hand."""
    stage = config.deepspeed.zero_stage
    # The default allocates 2 GB for gradients on their way, however small the model.
    bucket = min(500_000_000, parameters(config.model))
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket}
    if stage == 3:
        # The default reduces into shards by dividing by dp * sp, sp times too much for sequences.
        zero["reduce_scatter"] = False
        # The default replaces torch.nn.functional.linear in the whole process, for good.
        zero["memory_efficient_linear"] = False
        zero["stage3_param_persistence_threshold"] = config.deepspeed.persistence_threshold
    derived: dict[str, Any] = {
        # counted over dp alone: the ranks of one sequence share its samples
        "train_batch_size": config.train.batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.optim.clip,  # DeepSpeed's default is 1.0, so always said
        "steps_per_print": 10**9,
        "zero_optimization": zero,
    }
    if config.train.dtype == "bf16":
        derived["bf16"] = {"enabled": True}
        if stage != 1:  # gradients are summed and sent in fp32; stage 1 only does so in bf16
            derived["communication_data_type"] = "fp32"
            derived["seq_parallel_communication_data_type"] = "fp32"
        if stage >= 2:  # at stage 0 it would mean another optimizer: see Engine
            derived["data_types"] = {"grad_accum_dtype": "fp32"}
    return derived
