"""What ranks do for the tests of tensor-parallel and FSDP2-sharded models of transformers."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import load as load_checkpoint
from torch.distributed.checkpoint import save as save_checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dlogp_kernels.hf import token_logp, token_metrics


def load(path: Path, kind: str, size: int) -> PreTrainedModel:
    """The model in `path`, of all ranks together by `kind`: "tp", "fsdp" or, of each rank, "whole"."""
    if kind == "tp":
        from transformers.distributed import DistributedConfig

        config = DistributedConfig(tp_size=size, tp_plan="auto")
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, distributed_config=config)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if kind == "fsdp":
        shard(model, size)
    return model


def shard(
    model: PreTrainedModel,
    size: int,
    root: nn.Module | None = None,
    mixed: bool = False,
    together: list[nn.Module] | None = None,
) -> None:
    """By FSDP2: its layers, and then the model, or what it is wrapped in.

    `mixed` computes in bfloat16; modules `together` are gathered as one, and stay so until backward.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh, dtype = init_device_mesh("cpu", (size,)), torch.bfloat16 if mixed else None
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
    if together is not None:
        whole = MixedPrecisionPolicy(param_dtype=dtype)
        fully_shard(together, mesh=mesh, reshard_after_forward=False, mp_policy=whole)
    policy = MixedPrecisionPolicy(param_dtype=dtype, output_dtype=torch.float32 if mixed else None)
    fully_shard(model if root is None else root, mesh=mesh, mp_policy=policy)


class Measured(NamedTuple):
    logp: Tensor
    entropy: Tensor
    gradients: dict[str, Tensor]
    #: How the last layer's weight lies.
    head: str


def measured(group: Any, path: Path, kind: str, batches: list[Tensor]) -> Measured:
    """Of a batch of tokens a rank; of tensor-parallel ranks it is the same."""
    model = load(path, kind, group.size())
    stats = token_logp(model, batches[group.rank()])
    (stats.logp.mean() + 0.1 * stats.entropy.mean()).backward()
    weight = model.get_output_embeddings().weight
    grads = {name: whole(x.grad) for name, x in model.named_parameters()}
    return Measured(stats.logp.detach(), stats.entropy.detach(), grads, type(weight).__name__)


def trainers_head(group: Any, path: Path, kind: str, batches: list[Tensor]) -> Measured:
    """As `measured`, by what `ReweightedGRPOTrainer` puts into a model: the fused head within its own forward."""
    from dlogp_kernels.trl.head import add_logp_head

    model, tokens = load(path, kind, group.size()), batches[group.rank()]
    add_logp_head(model, temperature=1.0, float32_head=False)
    found = model(tokens, torch.ones_like(tokens), labels=tokens, fused_lm_head=True)
    (found.log_probs.mean() + 0.1 * found.entropy.mean()).backward()
    grads = {name: whole(x.grad) for name, x in model.named_parameters()}
    head = type(model.get_output_embeddings().weight).__name__
    return Measured(found.log_probs.detach(), found.entropy.detach(), grads, head)


def whole_within(group: Any, path: Path) -> list[tuple[list[str], list[bool]]]:
    """How parameters lie, and which modules free them after a forward, before, in and after what ends by an error."""
    from dlogp_kernels.trl.fsdp import _frees_after_forward, _sharded, whole_weights

    model = load(path, "fsdp", group.size())

    def state() -> tuple[list[str], list[bool]]:
        return [type(x).__name__ for x in model.parameters()], list(map(_frees_after_forward, _sharded(model)))

    states = []
    try:
        # The first forward says which module is the root, whose weights stay.
        token_logp(model, torch.ones(1, 4, dtype=torch.int64)).logp.sum().backward()
        states.append(state())
        with whole_weights(model):
            states.append(state())
            if group.rank() == 0:
                token_logp(model, torch.ones(1, 4, dtype=torch.int64))
            raise KeyError
    except KeyError:
        states.append(state())
    return states


def pair(group: Any, path: Path, base_path: Path, kinds: tuple[str, str], tokens: Tensor) -> Any:
    """The statistics of a pair of which either may be sharded."""
    models = [load(place, kind, group.size()) for place, kind in zip((path, base_path), kinds, strict=True)]
    with torch.no_grad():
        stats = token_metrics(*models, tokens)
    return tuple(x for x in stats if x is not None)


def trained(group: Any, path: Path, kind: str, tokens: Tensor, steps: int, checkpoint: Path, resumed: bool) -> Any:
    """Losses of steps from a checkpoint of model and optimiser, or from the beginning; it is written in the end."""
    model = load(path, kind, group.size())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    if resumed:
        state = get_state_dict(model, optimizer)
        load_checkpoint({"model": state[0], "optimizer": state[1]}, checkpoint_id=checkpoint)
        set_state_dict(model, optimizer, model_state_dict=state[0], optim_state_dict=state[1])
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -token_logp(model, tokens).logp.mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if kind != "whole":
        state = get_state_dict(model, optimizer)
        save_checkpoint({"model": state[0], "optimizer": state[1]}, checkpoint_id=checkpoint)
    return losses


def with_adapters(path: Path, kind: str, size: int, targets: list[str], root: bool = False) -> Any:
    """A PeftModel; by FSDP2 the model within it is sharded, or with `root` itself."""
    from peft import LoraConfig, get_peft_model

    model = load(path, "whole" if kind == "fsdp" else kind, size)
    torch.manual_seed(0)
    adapted: Any = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    if kind == "fsdp":
        shard(model, size, adapted if root else None)
    return adapted


def last_layer_trained(
    group: Any, path: Path, kind: str, tokens: Tensor, targets: list[str] | None
) -> tuple[list[float], list[float]]:
    """Losses of steps of adapters, or of the last layer alone, and between steps those without gradients."""
    if targets is None:
        model: Any = load(path, "whole", group.size())
        model.requires_grad_(False).get_output_embeddings().requires_grad_(True)
        if kind == "fsdp":
            shard(model, group.size(), together=[model.model.norm, model.lm_head])
    else:
        model = with_adapters(path, kind, group.size(), targets)
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=1e-2, foreach=False)
    losses, evaluated = [], []
    for _ in range(3):
        optimizer.zero_grad()
        loss = -token_logp(model, tokens).logp.mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            evaluated.append(-token_logp(model, tokens).logp.mean().item())
    return losses, evaluated


def mixed(group: Any, path: Path, tokens: Tensor, together: bool) -> tuple[Tensor, Tensor]:
    """Log p by token_logp and by the model's own logits, in bfloat16 with float32 around it."""
    model = load(path, "whole", group.size())
    shard(model, group.size(), mixed=True, together=[model.model.norm, model.lm_head] if together else None)
    with torch.no_grad():
        own = model(tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        return token_logp(model, tokens).logp, own


def refused(group: Any, path: Path, kind: str, tokens: Tensor) -> str:
    """What is said of adapters that can not be served."""
    try:
        token_logp(with_adapters(path, kind, group.size(), ["lm_head"], root=True), tokens)
    except TypeError as error:
        return str(error)
    return "nothing"


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x
