"""Log-probabilities and entropies instead of logits, from within a model's own forward."""

import functools
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from ..hf import lm_head_inputs
from ..hf.backbone import in_own_forward

_INPUTS = ("input_ids", "attention_mask")


def add_logp_head(model: PreTrainedModel, *, temperature: float, float32_head: bool) -> None:
    """Make `model(input_ids, attention_mask, labels=…, fused_lm_head=True)` return what TRL's own fused head does.

    That is how TRL asks for log-probabilities and entropies, (B, T − 1): entry t is about predicting token t + 1, 0
    where its label is −100. They have to come from within the model's forward, where DDP, FSDP and mixed precision have
    their hooks. Any other call is what it was before, so generation is unchanged.

    Args:
        model: a causal language model, the innermost one where PEFT or a parallel wrapper is around it.
        temperature: divides the logits.
        float32_head: keep the last layer's product out of autocast.
    """
    forward_before = model.forward

    # The signature stays: `generate` looks its arguments up there.
    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **options: Any) -> Any:
        if not fused_lm_head:
            return forward_before(*args, **options)
        labels = options.pop("labels")
        others = [name for name, value in options.items() if value is not None and name not in _INPUTS]
        if others:
            raise ValueError(
                f"the model is called with {', '.join(others)}, expected input_ids, attention_mask and labels alone"
            )
        with in_own_forward(self):
            inputs = lm_head_inputs(self, *args, **{name: options[name] for name in _INPUTS if name in options})
        device_type = inputs.hidden.device.type
        with torch.autocast(device_type, enabled=torch.is_autocast_enabled(device_type) and not float32_head):
            shifted = inputs._replace(hidden=inputs.hidden[:, :-1])
            stats = shifted.logp(labels[:, 1:], temperature=temperature)
        return FusedCausalLMOutput(log_probs=stats.logp, entropy=stats.entropy)

    model.forward = MethodType(forward, model)  # type: ignore[method-assign]
