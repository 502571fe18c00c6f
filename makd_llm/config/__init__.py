"""A run, described by frozen pydantic models.

One YAML file (`--config`) and any number of `key.path=value` overrides become one `RunConfig`;
OmegaConf merges them, pydantic checks them. Unknown keys are refused by path, with the nearest
known key. What DeepSpeed's own JSON (`--ds`) rules is not here: ds_configs/README.md says which
side owns which key, `train/deepspeed_config.py` joins the two.

run.py has the sections, objectives.py what can be learnt, presets/ which of it together; compare.py
a comparison of several runs.

Only the pipeline, the command line and `build_*` functions read this; classes below them take plain
arguments.
"""

from makd_llm.config.compare import CompareConfig, load_comparison
from makd_llm.config.load import checked, dump_config, load_config, validated
from makd_llm.config.run import (
    DataConfig,
    DistilConfig,
    RunConfig,
    StudentConfig,
    TrainConfig,
)

__all__ = [
    "CompareConfig",
    "DataConfig",
    "DistilConfig",
    "RunConfig",
    "StudentConfig",
    "TrainConfig",
    "checked",
    "dump_config",
    "load_comparison",
    "load_config",
    "validated",
]
