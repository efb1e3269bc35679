"""The output head against logits and torch's cross-entropy."""

import torch
import torch.nn.functional as F

from steptron.nn.embedding import OutputHead


def test_head_is_the_loss_of_its_logits():
    torch.manual_seed(0)
    head, x, targets = OutputHead(8, 20), torch.randn(2, 5, 8), torch.randint(20, (2, 5))
    targets[0, 3] = -100
    expected = F.cross_entropy((x @ head.weight.T).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(head(x, targets, 4), expected)


def test_head_on_meta_has_the_shape_of_the_released_one():
    with torch.device("meta"):
        assert OutputHead(4096, 128896).weight.shape == (128896, 4096)
