"""How many of some channels may go where a forward counts them."""

import torch

from taylor_pruning.surgery.ids import ChannelIds


def test_channels_that_stay_leave_a_multiple_to_the_others():
    """Of eight in fours: two stay, four of the others go together, and the last two have to stay too."""
    ids = ChannelIds()
    channels = ids.new(8)
    ids.protect(channels[[0, 4]], "are read at their places")
    ids.multiples.append((channels, 4, (), "are divided"))
    roots = ids.roots()
    assert roots[[1, 2, 3, 5]].unique().tolist() == [1]
    assert torch.cat([roots[some] for some, _ in ids.reasons]).unique().tolist() == [0, 4, 6]
    assert roots[7] == 6


def test_channels_that_go_in_a_multiple_anyway_go_alone():
    ids = ChannelIds()
    channels = ids.new(8)
    ids.unite(channels[1:2], channels[2:5])
    ids.multiples.append((channels, 4, (), "are divided"))
    assert ids.roots().tolist() == [0, 1, 1, 1, 1, 0, 0, 0]


def test_channels_without_which_a_sum_would_be_wrong_stay():
    """Those of `more` are as many as the second has more than the first; of the second, half are those of `more`."""
    ids = ChannelIds()
    first, second, more = ids.new(2), ids.new(4), ids.new(2)
    ids.unite(more, second[:2])
    ids.sums.append((more, ((second, 1), (first, -1)), "fill up"))
    ids.roots()
    assert [(some.tolist(), reason) for some, reason in ids.reasons] == [([0, 1, 4, 5], "fill up")]
