import pytest
import torch
from torch import Tensor

from smezo_pl.data import Collate, PromptBatch
from smezo_pl.data.encoding import Encoded

EXAMPLES = [
    # One-token candidates: one row.
    Encoded((11, 12, 13), ((1,), (2,)), 1, (1,), index=70),
    # Different first tokens, two rows; the third begins the first: no row of its own.
    Encoded((21, 22), ((1, 2, 3), (4, 5), (1, 6)), 0, (0, 2), index=71),
    Encoded((31, 32, 33, 34, 35), ((1, 2), (1, 3)), 1, (1,), index=72),
]


def written_out(batch: PromptBatch) -> list[dict[str, object]]:
    """For each example: what is fed before each scored token, and the token, by candidate."""
    examples: list[dict[str, object]] = []
    for number in range(len(batch)):
        candidates = {}
        for k in torch.nonzero(batch.candidate_example == number).flatten().tolist():
            tokens = []
            places = torch.nonzero(batch.token_candidate == k).flatten().tolist()
            assert (
                batch.token_order[places].tolist() == list(range(len(places)))
                and len(places) == batch.candidate_tokens[k]
            )
            for s in places:
                row = int(batch.token_row[s])
                end = batch.input_ids.shape[1] - batch.logits_to_keep + int(batch.token_pos[s])
                real = batch.attention_mask[row, : end + 1].bool()
                context = batch.input_ids[row, : end + 1][real].tolist()
                assert batch.position_ids[row, end] == len(context) - 1
                tokens.append((tuple(context), int(batch.token_id[s])))
            candidates[int(batch.candidate_index[k])] = (tokens, bool(batch.candidate_correct[k]))
        examples.append(
            {"candidates": candidates, "label": int(batch.labels[number]), "index": int(batch.index[number])}
        )
    return examples


def expected(example: Encoded) -> dict[str, object]:
    candidates = {
        place: ([((*example.prompt, *tokens[:i]), token) for i, token in enumerate(tokens)], place in example.correct)
        for place, tokens in enumerate(example.candidates)
    }
    return {"candidates": candidates, "label": example.label, "index": example.index}


def test_every_token_is_scored_after_exactly_what_goes_before_it() -> None:
    batch = Collate(pad_id=99)(EXAMPLES)
    assert written_out(batch) == [expected(example) for example in EXAMPLES]
    assert (len(batch), batch.num_rows, batch.num_candidates) == (3, 4, 3)
    assert batch.logits_to_keep == 3
    assert batch.answer_tokens == 1 + 3 + 2


def test_rows_are_padded_on_the_left_and_end_before_the_last_token() -> None:
    batch = Collate(pad_id=99)(EXAMPLES)
    assert batch.input_ids.tolist() == [
        [99, 99, 99, 11, 12, 13],
        [99, 99, 21, 22, 1, 2],
        [99, 99, 99, 21, 22, 4],
        [31, 32, 33, 34, 35, 1],
    ]
    assert batch.attention_mask.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [1] * 6]
    assert batch.position_ids.tolist() == [
        [0, 0, 0, 0, 1, 2],
        [0, 0, 0, 1, 2, 3],
        [0, 0, 0, 0, 1, 2],
        [0, 1, 2, 3, 4, 5],
    ]


def test_one_token_candidates_read_one_row_and_one_position() -> None:
    batch = Collate(0)([EXAMPLES[0]] * 5)
    assert (batch.num_rows, batch.logits_to_keep) == (5, 1)


def test_right_only() -> None:
    batch = Collate(99, "lm", right_only=True)(EXAMPLES)
    for found, example in zip(written_out(batch), EXAMPLES, strict=True):
        whole = expected(example)
        assert found == {**whole, "candidates": {example.label: whole["candidates"][example.label]}}  # type: ignore[index]
    assert batch.num_rows == 3
    with pytest.raises(ValueError, match="row 70 has no label"):
        Collate(99, "lm", right_only=True)([Encoded((11,), ((1,), (2,)), -1, (), index=70)])


def test_no_examples() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        Collate(0)([])


def test_unknown_labels_leave_no_answer() -> None:
    assert Collate(0)([EXAMPLES[0], Encoded((1,), ((1,), (2,)), -1, (), index=0)]).answer_tokens == 0


@pytest.mark.parametrize("right_only", [False, True])
@pytest.mark.parametrize("micro", [1, 2, 3, 4])
def test_split_is_the_batches_of_the_parts(micro: int, right_only: bool) -> None:
    examples = [*EXAMPLES, Encoded((41,), ((5,), (6,)), 0, (0,), index=73)]
    collate = Collate(99, "lm" if right_only else "classification", right_only)
    parts = collate(examples).split(micro)
    # Shortest first; equal lengths keep their order.
    order = [3, 0, 1, 2] if micro < 4 else [0, 1, 2, 3]
    fresh = [collate([examples[i] for i in order[start : start + micro]]) for start in range(0, 4, micro)]
    assert len(parts) == len(fresh)
    for part, whole in zip(parts, fresh, strict=True):
        assert written_out(part) == written_out(whole)
        assert part.input_ids.shape == whole.input_ids.shape
        for name in ("logits_to_keep", "num_candidates", "answer_tokens", "objective"):
            assert getattr(part, name) == getattr(whole, name), name
    assert sum(part.answer_tokens for part in parts) == collate(examples).answer_tokens


def test_a_batch_that_is_small_enough_is_not_split() -> None:
    batch = Collate(0)(EXAMPLES)
    assert batch.split(3) == [batch]


@pytest.mark.parametrize("micro", [0, -1])
def test_split_out_of_range(micro: int) -> None:
    with pytest.raises(ValueError, match=f"micro_batch_size must be at least 1, got {micro}"):
        Collate(0)(EXAMPLES).split(micro)


def test_to_moves_every_tensor() -> None:
    moved = Collate(0)(EXAMPLES).to("meta")
    values = [getattr(moved, name) for name in moved.__dataclass_fields__]
    assert {value.device.type for value in values if isinstance(value, Tensor)} == {"meta"}
    assert moved.logits_to_keep == 3
