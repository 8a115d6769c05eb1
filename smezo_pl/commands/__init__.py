"""The subcommands of ``smezo``: where the code of each is, and what it does.

Nothing here imports torch: ``smezo --help`` and a misspelt subcommand answer at once.
"""

SUBCOMMANDS = {
    "fit": ("cli:main", "fine-tune a model and evaluate it before and after"),
    "validate": ("cli:main", "evaluate a model, or a checkpoint with --ckpt_path, on the validation split"),
    "test": ("cli:main", "the same on the test split"),
    "predict": ("cli:main", "write prompt, scores, prediction and label of every test example as JSONL"),
    "sweep": ("commands.sweep:main", "fit at every point of a grid, resumable; mean and deviation over seeds"),
    "compare": ("commands.compare:main", "compare runs, finished or not: a table and curves"),
    "preview": ("commands.preview:main", "what the model sees: prompts, scored tokens, lengths, label balance"),
    "show": ("commands.show:main", "settings, progress and loss of a run, and whether its trajectory is valid"),
    "replay": ("commands.weights:replay_main", "weights of any step, from the trajectory, as a Hugging Face folder"),
    "evaluate": ("commands.evaluate:main", "the validation curve of a run, computed afterwards from its trajectory"),
    "export": ("commands.weights:export_main", "a whole fine-tune in one small file"),
    "apply": ("commands.weights:apply_main", "an exported run on its base model, as a Hugging Face folder"),
}
"""Entry point in ``smezo_pl``, a function of the arguments with the subcommand first; summary in ``--help``."""
