"""The verbs of ``smezo``: one line each, and where the code is that runs it.

Nothing here imports torch: ``smezo --help`` and a misspelt verb answer at once.
"""

from typing import NamedTuple


class Verb(NamedTuple):
    """A verb of the command line.

    Attributes:
        module: Module of its function ``main(args)``, given the arguments with the verb in front.
        summary: What it does, in one line.
        function: Name of the function in the module.
    """

    module: str
    summary: str
    function: str = "main"


VERBS = {
    "fit": Verb("smezo_pl.cli", "fine-tune a model and measure it before and after"),
    "validate": Verb("smezo_pl.cli", "measure a model, or a checkpoint with --ckpt_path, on the validation split"),
    "test": Verb("smezo_pl.cli", "the same on the test split"),
    "predict": Verb("smezo_pl.cli", "write prompt, scores, prediction and label of every test example as JSONL"),
    "sweep": Verb("smezo_pl.commands.sweep", "fit for every point of a grid, resumable; mean and deviation over seeds"),
    "compare": Verb("smezo_pl.commands.compare", "runs beside each other, finished or not: a table and curves"),
    "preview": Verb(
        "smezo_pl.commands.preview", "what the model will see: prompts, scored tokens, lengths, balance of the labels"
    ),
    "show": Verb("smezo_pl.commands.show", "what a run is, how far it is, and whether its record is sound"),
    "replay": Verb(
        "smezo_pl.commands.weights",
        "the weights of any step of a run, from its record, as a Hugging Face folder",
        "replay_main",
    ),
    "evaluate": Verb("smezo_pl.commands.evaluate", "the validation curve of a run after the fact, from its record"),
    "export": Verb("smezo_pl.commands.weights", "a whole fine-tune in one small file", "export_main"),
    "apply": Verb(
        "smezo_pl.commands.weights", "an exported fine-tune on its base model, as a Hugging Face folder", "apply_main"
    ),
}
"""All verbs, in the order of ``smezo --help``."""
