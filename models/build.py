"""The model that a configuration describes."""

from models.config import ModelConfig
from models.decision import DecisionModel
from models.lm import LanguageModel
from models.stack import Stack


def build_model(config: ModelConfig) -> Stack:
    """Of frames where their widths are set, else of tokens."""
    return (DecisionModel if config.of_frames else LanguageModel)(config)
