from __future__ import annotations

import torch

from qadtr_brevitas.auditing.losses import cross_entropy, dlr, margin, scaled_cross_entropy


def test_losses_of_known_logits() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 4.0, 2.0]])
    labels = torch.tensor([0, 2])
    assert torch.equal(margin(logits, labels), torch.tensor([2.0, -2.0]))
    assert torch.allclose(dlr(logits, labels), torch.tensor([2 / 3, -2 / 4]))
    assert torch.allclose(dlr(100 * logits, labels), dlr(logits, labels))
    assert torch.allclose(scaled_cross_entropy(10)(logits, labels), cross_entropy(10 * logits, labels))
    assert torch.isfinite(dlr(torch.zeros(1, 3), torch.tensor([0]))).all()
