"""Both ends of the network against torch's own, whole and by rows of the vocabulary."""

from functools import partial

import torch
import torch.nn.functional as F
from steptron.nn.embedding import Embedding, OutputHead
from steptron.nn.loss import chunked_log_probs


def test_head_gives_what_is_read_of_it_its_tokens_and_its_rows():
    torch.manual_seed(0)
    head, x, targets = OutputHead(8, 20), torch.randn(2, 5, 8), torch.randint(20, (2, 5))
    expected = -F.cross_entropy((x @ head.weight.T).flatten(0, 1), targets.flatten(), reduction="none")
    found_N = head(x, partial(chunked_log_probs, targets_N=targets.flatten(), chunk=4))
    torch.testing.assert_close(found_N, expected.detach())


def test_head_on_meta_has_the_shape_of_the_released_one():
    with torch.device("meta"):
        assert OutputHead(4096, 128896).weight.shape == (128896, 4096)


def test_shards_of_the_embedding_add_up_to_the_whole():
    torch.manual_seed(0)
    whole, tokens = Embedding(20, 8), torch.randint(20, (3, 7))
    total = torch.zeros(3, 7, 8)
    for first, last in ((0, 6), (6, 13), (13, 20)):
        shard = Embedding(last - first, 8)
        shard.first_row = first
        with torch.no_grad():
            shard.weight.copy_(whole.weight[first:last])
            total += shard(tokens)
    assert torch.equal(total, whole(tokens).detach()), "each token's row is on one of them, the others give zeros"
