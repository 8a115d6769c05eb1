"""The subcommands of ``smezo``: where the code of each is, and what it does.

Nothing here imports torch: ``smezo --help`` and a misspelt subcommand answer at once.
"""

SUBCOMMANDS = {
    "fit": ("smezo_pl.cli:main", "fine-tune a model and evaluate it before and after"),
    "validate": ("smezo_pl.cli:main", "evaluate a model, or a checkpoint with --ckpt_path, on the validation split"),
    "test": ("smezo_pl.cli:main", "the same on the test split"),
    "predict": ("smezo_pl.cli:main", "write prompt, scores, prediction and label of every test example as JSONL"),
    "sweep": ("smezo_pl.commands.sweep:main", "fit at every point of a grid, resumable; mean and deviation over seeds"),
    "compare": ("smezo_pl.commands.compare:main", "compare runs, finished or not: a table and curves"),
    "preview": (
        "smezo_pl.commands.preview:main",
        "what the model sees: prompts, scored tokens, lengths, label balance",
    ),
    "show": (
        "smezo_pl.commands.show:main",
        "settings, progress and loss of a run, and whether its trajectory is valid",
    ),
    "replay": (
        "smezo_pl.commands.weights:replay_main",
        "weights of any step, from the trajectory, as a Hugging Face folder",
    ),
    "evaluate": (
        "smezo_pl.commands.evaluate:main",
        "the validation curve of a run after the fact, from its trajectory",
    ),
    "export": ("smezo_pl.commands.weights:export_main", "a whole fine-tune in one small file"),
    "apply": ("smezo_pl.commands.weights:apply_main", "an exported run on its base model, as a Hugging Face folder"),
}
"""Entry point (a function of the arguments, the subcommand first) and summary of each, in the order of ``--help``."""
