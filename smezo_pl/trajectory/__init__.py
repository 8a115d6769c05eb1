"""The trajectory of a run: all that a fine-tune adds to its starting weights, in a file that can be mailed.

A zeroth-order step is a seed and one number, so a trajectory is a header and a few bytes per step. From the starting
weights and the trajectory come the weights of any step, to the last bit, with no data and no forward::

    with record(optimizer, "run/trajectory.smezo"):  # a plain loop; in the Trainer SeedCheckpoint does it
        ...
    replay("run", model)  # on a model with the starting weights

A finished run is exported to one safetensors file (`export`), which `apply` makes a trained model of.
"""

from smezo_pl.trajectory.exports import export, load
from smezo_pl.trajectory.header import TrajectoryError
from smezo_pl.trajectory.log import Trajectory
from smezo_pl.trajectory.recorder import Recorder, record
from smezo_pl.trajectory.replaying import Applied, apply, replay

__all__ = ["Applied", "Recorder", "Trajectory", "TrajectoryError", "apply", "export", "load", "record", "replay"]
