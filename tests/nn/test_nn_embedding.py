"""Both ends of the network against torch's own, whole and by rows of the vocabulary."""

import torch
import torch.nn.functional as F

from steptron.nn.embedding import Embedding, OutputHead


def test_head_is_the_loss_of_its_logits():
    torch.manual_seed(0)
    head, x, targets = OutputHead(8, 20), torch.randn(2, 5, 8), torch.randint(20, (2, 5))
    targets[0, 3] = -100
    expected = F.cross_entropy((x @ head.weight.T).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(head(x, targets, 4), expected)


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
