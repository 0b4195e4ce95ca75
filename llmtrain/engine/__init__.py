"""The one seam between the loop and what runs it.

The loop, checkpoints and metrics know `Engine` only; nothing outside this folder imports accelerate or deepspeed.
"""

from llmtrain.engine.choose import launch_settings, make_engine, refuse_contradictions
from llmtrain.engine.protocol import Engine, Fragment, Limits, Outcome, Verdict

__all__ = [
    "Engine",
    "Fragment",
    "Limits",
    "Outcome",
    "Verdict",
    "launch_settings",
    "make_engine",
    "refuse_contradictions",
]
