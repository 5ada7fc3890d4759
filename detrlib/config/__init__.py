"""Typed, frozen settings (`settings`, `model`, ...), and how files (`yaml_text`) and overrides become them (`load`).

What the machine settles, cores and the folder of what is made once, is asked of `machine`.
"""

from detrlib.config.attention import TransformName
from detrlib.config.huggingface import HuggingFace
from detrlib.config.load import (
    PROJECT,
    changed_settings,
    flat_settings,
    given_twice,
    known_settings,
    load_config,
    project_path,
    replace,
    save_config,
)
from detrlib.config.model import Backbone, Deformable, Detr
from detrlib.config.settings import Config, Data, Evaluate, Loss, Model, Shapes, Train
from detrlib.config.yaml_text import parse_value, read_yaml
