"""Linear probing: one linear layer on the frozen network's features of the last prompt position."""

from typing import Any

import torch
from torch import Tensor, nn

from smezo_pl.data.batch import PromptBatch
from smezo_pl.scoring.logits import model_logits

MOST_LABELS = 64
"""Rows of the layer. Those of labels that a task does not have get no gradient and stay zero."""


class LinearProbe(nn.Module):
    """A frozen language model with a linear layer in place of its vocabulary.

    The features are what the network passes to its output embedding at the position that predicts the first token of
    the candidates; label ``c`` is scored ``head(features)[c]``, and the scores are the logits of the cross-entropy
    over the task's candidates. The layer starts at zero.

    Args:
        network: A causal language model of transformers. It is frozen.

    Raises:
        ValueError: If the network does not name its output embedding.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        output: Any = getattr(network, "get_output_embeddings", lambda: None)()
        width = getattr(output, "in_features", None)
        if width is None:
            raise ValueError(
                f"method 'linear-probe' needs a language model of transformers, whose features go into a linear "
                f"output embedding; {type(network).__name__} names none"
            )
        self.network = network.requires_grad_(False)
        # float32 whatever the network's dtype: AdamW's updates of a 16-bit layer would be rounded away
        self.head = nn.Linear(width, MOST_LABELS, dtype=torch.float32, device=output.weight.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's forward, without the layer."""
        return self.network(*args, **kwargs)

    def scores(self, batch: PromptBatch) -> Tensor:
        """The layer's score of each candidate, float32 ``[K]``; the batch must be of a classification task.

        Raises:
            ValueError: If a candidate is no label but a text of its own, or there are more than `MOST_LABELS` labels.
        """
        if batch.objective != "classification" or batch.calibration is not None:
            raise ValueError("method 'linear-probe' needs labels: this task has texts of their own, or calibrates them")
        if batch.num_candidates > MOST_LABELS:
            raise ValueError(f"method 'linear-probe' takes up to {MOST_LABELS} labels, got {batch.num_candidates}")
        captured: list[Tensor] = []
        output: nn.Module = self.network.get_output_embeddings()  # type: ignore[operator]
        # After the forward, since `model_logits` selects the positions that are read before it.
        hook = output.register_forward_hook(lambda _, inputs, __: captured.append(inputs[0]))
        try:
            with torch.no_grad():
                model_logits(self.network, batch)
        finally:
            hook.remove()
        features = captured[-1][0]  # [P, H]
        first = batch.token_order == 0  # one token per candidate, in the order of candidates below
        at_prompt = features[batch.token_logit[first]].float()  # [K, H]
        with torch.autocast(at_prompt.device.type, enabled=False):
            outputs: Tensor = self.head(at_prompt)  # [K, MOST_LABELS]
        candidate = batch.token_candidate[first]
        scores = outputs.gather(1, batch.candidate_index[candidate].unsqueeze(1)).squeeze(1)
        return scores[candidate.argsort()]
