import itertools

import pytest
import torch

from smezo_pl.data import Encoded
from smezo_pl.data.collate import group_examples
from smezo_pl.data.packing import MIN_SHARED, common_prefix, pack, tree_size


@pytest.mark.parametrize("one", [(), (1,), (1, 2, 3), (1, 2, 4), (1, 2, 3, 4, 5), (2,)])
@pytest.mark.parametrize("two", [(), (1, 2, 3), (1, 2, 3, 9), (3, 2, 1)])
def test_common_prefix(one: tuple[int, ...], two: tuple[int, ...]) -> None:
    longest = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))
    assert common_prefix(one, two) == longest


def test_a_row_holds_every_prefix_once() -> None:
    row, paths = pack([(1, 2, 3), (1, 2), (1, 2, 4, 5), (1, 6)])
    assert row.tokens == [1, 2, 3, 4, 5, 6]
    assert row.depth == [0, 1, 2, 2, 3, 1]
    assert row.end == [6, 5, 3, 5, 5, 6]
    assert paths == {(1, 2, 3): [0, 1, 2], (1, 2): [0, 1], (1, 2, 4, 5): [0, 1, 3, 4], (1, 6): [0, 5]}


@pytest.mark.parametrize("seed", range(20))
def test_the_path_to_a_token_is_its_text(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (12,), generator=generator).tolist()
    texts = {tuple(torch.randint(0, 2, (length,), generator=generator).tolist()) for length in lengths}
    row, paths = pack(texts)
    assert len(row.tokens) == tree_size(texts) == len({text[:i] for text in texts for i in range(1, len(text) + 1)})
    for text, path in paths.items():
        before = [j for j in range(len(row.tokens)) if j <= path[-1] < row.end[j]]
        assert before == path
        assert tuple(row.tokens[j] for j in before) == text
        assert [row.depth[j] for j in before] == list(range(len(text)))


def example(prompt: tuple[int, ...], mask: int = -1) -> Encoded:
    return Encoded(prompt, ((1,), (2,)), 0, (0,), 0, mask_position=mask)


def test_neighbours_share_a_row_from_a_certain_length_on() -> None:
    shared = tuple(range(100, 100 + MIN_SHARED))
    examples = [example((*shared, 1)), example((5,)), example((*shared, 2)), example((*shared[:-1], 2)), example((5,))]
    assert group_examples(examples) == [[0, 2], [1], [3], [4]]
    # Those who look both ways see all of a row.
    assert group_examples([example((*shared, 1), mask=0), example((*shared, 2), mask=0)]) == [[0], [1]]


def test_a_row_ends_where_attention_outweighs_what_is_shared() -> None:
    passage = tuple(range(300))
    examples = [example((*passage, 1000 + i, *range(40))) for i in range(100)]
    groups = group_examples(examples)
    sizes = [300 + 41 * len(members) for members in groups]
    # P + sqrt(P^2 + 2000 P) = 1131
    assert all(1131 - 41 < size <= 1131 for size in sizes[:-1])
    assert [sum(groups, []), len(groups)] == [list(range(100)), 5]  # noqa: RUF017
    assert max(map(len, group_examples(examples, max_tokens=400))) == 2
    assert max(map(len, group_examples(examples, max_tokens=10))) == 1
