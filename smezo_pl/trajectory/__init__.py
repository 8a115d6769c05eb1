"""The record of a run: all that a fine-tune adds to its starting weights, in a file that can be mailed.

A zeroth-order step is a seed and one number, so the record of a run is a header and a few bytes a step. From the
starting weights and the record come the weights of any step, to the last bit (`replay`).

    with record(optimizer, "run/trajectory.smezo"):   # a plain loop; in the Trainer the SeedCheckpoint callback does it
        ...
    replay("run/trajectory.smezo", model)
"""
