"""Classifiers that transformers has no module for."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class EncoderDecoderClassifier(nn.Module):
    """An encoder-decoder and one linear classifier on the last decoder position, as PAC's timing code has it."""

    def __init__(self, backbone: PreTrainedModel, num_labels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.config.d_model, num_labels)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, decoder_input_ids: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """As the classifiers of transformers: `logits` are [rows, labels]."""
        decoded = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids, use_cache=False
        )
        return SequenceClassifierOutput(logits=self.classify(decoded.last_hidden_state))

    def classify(self, hidden: Tensor) -> Tensor:
        return self.classifier(hidden[:, -1])


def at_last_token(logits: Tensor, input_ids: Tensor, pad_token_id: int) -> Tensor:
    """Logits [rows, tokens, labels] at each row's rightmost token that is no padding: [rows, labels]."""
    position = torch.arange(input_ids.shape[1], device=input_ids.device, dtype=torch.int32)
    last = (position * (input_ids != pad_token_id).to(torch.int32)).argmax(-1)
    return logits[torch.arange(logits.shape[0], device=logits.device), last]
