"""Settings of one task, as LLM Foundry's YAML spells them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LM_ACCURACY = "InContextLearningLMAccuracy"
MC_ACCURACY = "InContextLearningMultipleChoiceAccuracy"
EXACT_MATCH = "InContextLearningGenerationExactMatchAccuracy"
LM_CALIBRATION = "InContextLearningLMExpectedCalibrationError"
MC_CALIBRATION = "InContextLearningMCExpectedCalibrationError"


@dataclass(frozen=True)
class EvalTask:
    """One entry of `icl_tasks`: a file of questions and how they are asked. Defaults are LLM Foundry's."""

    label: str
    dataset_uri: str
    icl_task_type: str
    num_fewshot: tuple[int, ...]
    metric_names: tuple[str, ...] = ()
    prompt_string: str = ""
    example_delimiter: str = "\n"
    continuation_delimiter: str = " "
    prelimiter: str = ""
    context_key: str = ""
    answer_key: str = ""
    choices_key: str = ""
    has_categories: bool = False
    strip_dataset: bool = True
    fewshot_random_seed: int = 1234
    max_seq_len: int | None = None
    batch_size: int | None = None
    cot_delimiter: str = ""
    early_stopping_criteria: tuple[str, ...] = ()
    do_normalization: bool = True
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)
    random_baseline: float | None = None
    data_path: str = ""

    @property
    def chance(self) -> float | None:
        """The accuracy of blind guessing, where the task says so."""
        return self.random_baseline
