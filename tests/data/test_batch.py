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
            positions = torch.nonzero(batch.token_candidate == k).flatten().tolist()
            assert (
                batch.token_order[positions].tolist() == list(range(len(positions)))
                and len(positions) == batch.candidate_tokens[k]
            )
            for s in positions:
                at = int(batch.token_logit[s])
                row, pos = int(batch.logit_row[at]), int(batch.logit_pos[at])
                seen = batch.visible()[row, pos]
                assert batch.attention_mask[row][seen].all()
                assert batch.position_ids[row][seen].tolist() == list(range(int(seen.sum())))
                tokens.append((tuple(batch.input_ids[row][seen].tolist()), int(batch.token_id[s])))
            candidates[int(batch.candidate_index[k])] = (tokens, bool(batch.candidate_correct[k]))
        examples.append(
            {"candidates": candidates, "label": int(batch.labels[number]), "index": int(batch.index[number])}
        )
    return examples


def expected(example: Encoded) -> dict[str, object]:
    candidates = {
        index: ([((*example.prompt, *tokens[:i]), token) for i, token in enumerate(tokens)], index in example.correct)
        for index, tokens in enumerate(example.candidates)
    }
    return {"candidates": candidates, "label": example.label, "index": example.index}


def test_every_token_is_scored_after_exactly_what_precedes_it() -> None:
    batch = Collate(pad_id=99)(EXAMPLES)
    assert written_out(batch) == [expected(example) for example in EXAMPLES]
    assert (len(batch), batch.num_rows, batch.num_candidates, batch.longest_candidate) == (3, 3, 3, 3)
    assert batch.answer_tokens == 1 + 3 + 2
    assert batch.branching and not batch.bidirectional


def test_candidates_share_a_row_padded_on_the_right_without_their_last_tokens() -> None:
    batch = Collate(pad_id=99)(EXAMPLES)
    assert batch.input_ids.tolist() == [
        [11, 12, 13, 99, 99, 99],
        [21, 22, 1, 2, 4, 99],
        [31, 32, 33, 34, 35, 1],
    ]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0], [1] * 6]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 2, 0], [0, 1, 2, 3, 4, 5]]
    # Padding sees itself, and is seen by nothing else.
    assert batch.visible()[1, 5].tolist() == [False] * 5 + [True]
    assert not batch.visible()[:, :5, 5].any()


def test_one_token_candidates_read_one_row_and_one_position() -> None:
    batch = Collate(0)([EXAMPLES[0]] * 5)
    assert (batch.num_rows, len(batch.logit_row), batch.branching) == (5, 5, False)


def test_neighbours_share_a_passage() -> None:
    passage = tuple(range(100, 140))
    examples = [
        Encoded((*passage, 1, 2), ((7,), (8,)), 0, (0,), index=0),
        Encoded((9, 9, 9), ((7,), (8,)), 1, (1,), index=1),
        Encoded((*passage, 1, 3), ((7, 5), (8,)), 1, (1,), index=2),
        Encoded((*passage[:31], 4), ((7,), (8,)), 0, (0,), index=3),
        Encoded((*passage, 1), ((7,), (8,)), 0, (0,), index=4),
    ]
    batch = Collate(0)(examples)
    assert written_out(batch) == [expected(example) for example in examples]
    # Passage, the token 1, 2, 3 and one of a candidate; the text that shares less than 32 tokens has its own row.
    assert batch.attention_mask.sum(1).tolist() == [44, 3, 32]
    for part, numbers in zip(batch.split(2), ([1, 3], [0, 2], [4]), strict=True):
        assert written_out(part) == [expected(examples[number]) for number in numbers]
    texts, lengths = batch.texts(batch.example_row, batch.example_pos)
    for example, text, length in zip(examples, texts, lengths, strict=True):
        assert text.tolist() == [*example.prompt, *[0] * (42 - len(example.prompt))] and length == len(example.prompt)


def test_a_masked_lm_scores_at_the_mask() -> None:
    shared = tuple(range(100, 140))
    examples = [
        Encoded((1, *shared, 4, 2), ((7,), (8,)), 1, (1,), index=0, mask_position=41),
        Encoded((1, *shared, 4, 5, 2), ((7,), (8,), (9,)), 0, (0,), index=1, mask_position=41),
    ]
    batch = Collate(0)(examples)
    assert batch.bidirectional and not batch.branching
    assert batch.input_ids.tolist() == [[*examples[0].prompt, 0], list(examples[1].prompt)]
    assert (batch.logit_row.tolist(), batch.logit_pos.tolist()) == ([0, 1], [41, 41])
    assert batch.token_id.tolist() == [7, 8, 7, 8, 9]
    assert batch.token_logit.tolist() == [0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="examples with a mask and examples without"):
        Collate(0)([*examples, EXAMPLES[0]])


def test_examples_without_candidates_have_prompts() -> None:
    batch = Collate(0, "lm")([Encoded((5, 6), (), -1, (), index=3), Encoded((5,), (), -1, (), index=4)])
    assert (len(batch), batch.num_candidates, batch.answer_tokens, len(batch.logit_row)) == (2, 0, 0, 0)
    assert batch.input_ids.tolist() == [[5, 6], [5, 0]]


def test_gold_only() -> None:
    batch = Collate(99, "lm", gold_only=True)(EXAMPLES)
    assert not batch.branching
    for found, example in zip(written_out(batch), EXAMPLES, strict=True):
        whole = expected(example)
        assert found == {**whole, "candidates": {example.label: whole["candidates"][example.label]}}  # type: ignore[index]
    assert batch.num_rows == 3
    with pytest.raises(ValueError, match="row 70 has no label"):
        Collate(99, "lm", gold_only=True)([Encoded((11,), ((1,), (2,)), -1, (), index=70)])


def test_no_examples() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        Collate(0)([])


def test_unknown_labels_leave_no_answer() -> None:
    assert Collate(0)([EXAMPLES[0], Encoded((1,), ((1,), (2,)), -1, (), index=0)]).answer_tokens == 0


@pytest.mark.parametrize("gold_only", [False, True])
@pytest.mark.parametrize("micro", [1, 2, 3, 4])
def test_split_is_the_batches_of_the_parts(micro: int, gold_only: bool) -> None:
    examples = [*EXAMPLES, Encoded((41,), ((5,), (6,)), 0, (0,), index=73)]
    collate = Collate(99, "lm" if gold_only else "classification", gold_only)
    parts = collate(examples).split(micro)
    # Shortest first; equal lengths keep their order.
    order = [3, 0, 1, 2] if micro < 4 else [0, 1, 2, 3]
    fresh = [collate([examples[i] for i in order[start : start + micro]]) for start in range(0, 4, micro)]
    assert len(parts) == len(fresh)
    for part, whole in zip(parts, fresh, strict=True):
        assert written_out(part) == written_out(whole)
        assert part.input_ids.shape == whole.input_ids.shape
        for name in ("branching", "longest_candidate", "num_candidates", "answer_tokens", "objective"):
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
    assert moved.longest_candidate == 3
