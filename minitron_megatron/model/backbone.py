"""A model that ends at its last hidden state."""

import torch
from megatron.core.models.gpt import GPTModel


class Backbone(GPTModel):
    """A GPT model whose forward ends at the last hidden state, before the output projection.

    Losses project it themselves, a chunk of tokens at a time, so that full-vocabulary logits never exist.
    Parameters, checkpoint keys and pipeline behaviour are GPTModel's.
    """

    def _postprocess(self, hidden_states, *args, **kwargs):
        return hidden_states

    @property
    def output_weight(self) -> torch.Tensor:
        """Weight of the output projection, `[vocab/tp, hidden]`; on the last stage only."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight
