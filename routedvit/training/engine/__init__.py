"""The one package that imports deepspeed: processes, the step under ZeRO, sharded state.

The rest of the trainer sees an `Engine` with one method per verb and never learns which ZeRO stage
runs underneath.
"""

# first: it sets what deepspeed reads while it is imported
from routedvit.training.engine.processes import start, stop  # isort: skip
from routedvit.training.engine.engine import Engine, StepResult, cast_to_parameters
from routedvit.training.engine.pretended import pretend

__all__ = ["Engine", "StepResult", "cast_to_parameters", "pretend", "start", "stop"]
