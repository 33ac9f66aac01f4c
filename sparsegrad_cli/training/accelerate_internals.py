"""What a run needs of accelerate that has no public name. Checked against accelerate 1.15.0."""

from __future__ import annotations

from accelerate.state import AcceleratorState, GradientState


def reset_accelerate() -> None:
    """Let the next Accelerator choose its own device and precision.

    accelerate keeps both for the whole process, and refuses a second Accelerator that differs. One
    process may train several runs: the commands of a Python program, or of a test.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
