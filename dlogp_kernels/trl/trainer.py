"""TRL's GRPO trainer with the fused ops, reweighted advantages and DAPO's sampling."""

import contextlib
import copy
import functools
import warnings
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor
from trl import GRPOTrainer

from ..functional import policy_loss
from ..hf.heads import unwrapped
from ..hf.verify import verified_lm_head
from ..policy_checks import check_options
from ..reference import grpo
from .checkpoints import read_rollouts, write_rollouts
from .config import ReweightedGRPOConfig
from .fsdp import whole_weights
from .head import add_logp_head
from .initial_policy import InitialPolicy
from .metrics import TokenSums, add_clip_ratios, add_delta_logp, policy_sums
from .rewards import OVERLONG_PENALTY, checked, informative_groups, overlong_penalty, without_scores_unpenalised
from .rollouts import (
    TOKENS_IN_BATCH,
    PromptOrder,
    Rollouts,
    draw_responses,
    gathered,
    joined,
    loss_mask,
    masked_out,
    model_inputs,
    num_groups_to_draw,
    num_rows,
    rows,
)
from .sharing import Sharing

_OLD, _REFERENCE, _START = "old_per_token_logps", "ref_per_token_logps", "start_per_token_logps"
#: Loss types whose denominator is the number of tokens of the whole optimiser step.
_BY_STEP = ("dapo", "cispo")


class ReweightedGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` whose log-probabilities, entropies and loss come from the fused ops, without a logit tensor.

    It takes what TRL's trainer takes, with a `ReweightedGRPOConfig`; with `reweight="none"` it trains as TRL's does.
    PEFT, gradient accumulation, gradient checkpointing, DDP, FSDP2, ZeRO-2 and mixed precision work as there. While
    responses are drawn under FSDP2, each process holds all weights.

    It logs all that TRL's trainer logs, and `clip_ratio/*` whatever the loss. Beside that, as means over tokens of all
    processes: `reweight/mean_weight`, `clip_ratio/dual_mean`, `approx_kl`, `ratio/mean`, `ratio/max`, and of Δlog p to
    the policy at the start of training `delta_logp/mean`, `delta_logp/min`, `delta_logp/max` and the shares of tokens
    in the tails, `delta_logp/below_-1` and `delta_logp/above_0.25`. With dynamic sampling: `dynamic_sampling/dropped`,
    the share of groups, and `dynamic_sampling/refills`.

    A checkpoint also holds the responses that are still to be learned from, so that a run that was stopped at any
    step and resumed has the losses of one that was not.

    A model that transformers has split by tensor parallelism (`DistributedConfig(tp_size=…)`) has the same responses on
    all its processes, drawn by `rollout_seed`; TRL counts each once for each of them, in `generation_batch_size` as in
    its own metrics. transformers writes no checkpoints of such a model (`save_strategy="no"`).

    Args:
        model: as in TRL: a causal language model of text, its directory or name, or a PeftModel of one.
        reward_funcs: as in TRL. A function that raises, or returns anything but a finite number or None for each
            response, ends the training with an error that names it.
        args: a `ReweightedGRPOConfig`.
        train_dataset: as in TRL; a prompt may also be a list of token ids.
        others, named: the other arguments of TRL's trainer.

    Raises:
        TypeError, ValueError: what can not be supported: models with images, a router's auxiliary loss, a last layer
            with an adapter, weights sharded by ZeRO-3; by name, with what to do.
    """

    args: ReweightedGRPOConfig
    model: Any
    train_dataset: Any
    num_generations: int

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: ReweightedGRPOConfig | None = None,
        *others: Any,
        **named: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = ReweightedGRPOConfig(f"{name.split('/')[-1]}-GRPO")
        if not isinstance(args, ReweightedGRPOConfig):
            raise TypeError(f"args is {type(args).__name__}, expected a ReweightedGRPOConfig")
        copies = _tensor_parallel_size(model)
        if copies > 1:
            args = args.for_tensor_parallel(copies)
        given: list[Any] = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        functions = [checked(f) if _is_function(f) else f for f in given if f is not None]
        if args.overlong_buffer and (functions or named.get("environment_factory")):
            assert args.max_completion_length is not None
            functions.append(overlong_penalty(args.max_completion_length, args.overlong_buffer, args.overlong_penalty))
            if args.reward_weights is not None:
                weights = [*args.reward_weights, 1.0]
                args = copy.copy(args)
                args.reward_weights = weights
        super().__init__(model, functions, args, *others, **named)  # type: ignore[misc]
        self._sharing = Sharing(self.accelerator, copies)
        if copies > 1:
            # TRL seeds each process by itself, which then shuffles what others have in another order.
            set_seed(args.seed + self._sharing.index)
        self._check_supported()
        self._use_fused_head()
        self._rewards = torch.empty(0)
        self._rows_drawn = 0
        # The configuration has filled in whichever of them was left out.
        assert args.generation_batch_size is not None and args.steps_per_generation is not None
        self._batch_size, self._steps = args.generation_batch_size, args.steps_per_generation
        self._sampler: Any = None
        self._refill_order: PromptOrder | None = None
        if args.dynamic_sampling:
            if not hasattr(self.train_dataset, "__getitem__"):
                raise TypeError("dynamic_sampling needs a train_dataset of known length, not an IterableDataset")
            self._refill_order = PromptOrder(len(self.train_dataset), args.seed)
        # With a reference model that stays as it is, its log-probabilities serve.
        self._reference_is_start = self.beta != 0.0 and not args.sync_ref_model
        self._start: InitialPolicy | None = None
        # FSDP shards the parameters when the training begins.
        if not self._dist.is_fsdp:
            self._keep_start()

    def _keep_start(self) -> None:
        """Keep the policy as it is, before the first step, unless that was done."""
        if self._start is None and self.args.delta_logp_responses and not self._reference_is_start:
            self._start = InitialPolicy(self.model)

    def _check_supported(self) -> None:
        if _tensor_parallel_size(self.model) != self._sharing.copies:
            raise ValueError(
                "model is given by name with a distributed_config that splits it, expected the model itself, from "
                "from_pretrained(…, distributed_config=…)"
            )
        if self._is_vlm:
            raise TypeError("processing_class is a processor of images, expected a tokenizer: models of text alone")
        if self.aux_loss_enabled:
            raise ValueError(
                f"router_aux_loss_coef is {self.router_aux_loss_coef}, expected 0: the auxiliary loss of a mixture of "
                "experts is not supported"
            )
        if self._dist.is_zero3:
            raise ValueError("DeepSpeed ZeRO-3 shards the weight of the last layer, expected stage 2 or lower, or FSDP")
        if self._dist.fsdp_version == 1 and self.args.delta_logp_responses:
            raise ValueError(
                f"delta_logp_responses is {self.args.delta_logp_responses} under FSDP 1, whose parameters can not be "
                "copied, expected 0, or fsdp_version 2"
            )
        if self.args.rollout_seed is not None and (self.tools or self.rollout_func is not None):
            raise ValueError("rollout_seed is given together with tools or rollout_func, expected None")

    def _use_fused_head(self) -> None:
        models = [self.model] if self.ref_model is None else [self.model, self.ref_model]
        for model in models:
            causal_lm = unwrapped(self.accelerator.unwrap_model(model))
            # Once, while the model is whole: that its logits are those of its hidden states and its last layer.
            verified_lm_head(causal_lm, torch.tensor(self.eos_token_ids[:1], device=causal_lm.device))
            add_logp_head(causal_lm, temperature=self.temperature, float32_head=self.args.cast_lm_head_to_fp32)

    # Responses

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], Any, Any]:
        """Prompts of a data set may also be lists of token ids, which are taken as they are."""
        if isinstance(prompts[0], list) and prompts[0] and isinstance(prompts[0][0], int):
            return prompts, None, {}
        return super()._tokenize_prompts(prompts)

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: Any,
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], Any]:
        # vLLM is given the shards one after another, and draws by itself.
        with contextlib.nullcontext() if self.use_vllm else whole_weights(self.model_wrapped):
            drawn_by_trl = self.args.rollout_seed is None or not self.model.training
            # It draws for each process by itself.
            if drawn_by_trl and self._sharing.copies == 1:
                return super()._generate_single_turn(
                    prompt_ids, images, multimodal_fields, num_generations, has_tool_images
                )
            first = self._rows_drawn + self._sharing.index * len(prompt_ids)
            self._rows_drawn += self._sharing.groups * len(prompt_ids)
            return draw_responses(self, prompt_ids, num_generations, first), None

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)
        # Those by which a group is told to be informative: DAPO's condition is on the answers, not on their lengths.
        self._rewards = rewards
        if OVERLONG_PENALTY in self.reward_func_names:
            column = self.reward_func_names.index(OVERLONG_PENALTY)
            rewards = without_scores_unpenalised(rewards, column)
            self._rewards = rewards.clone()
            self._rewards[:, column] = torch.nan
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Rollouts:
        if self.model.training:
            self._keep_start()
        rollouts = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return rollouts
        if self._refill_order is not None:
            rollouts = self._refilled(rollouts, self._refill_order)
        if self.args.reweight == "ppl":
            self._reweight_by_perplexity(rollouts)
        if self._reference_is_start and self.args.delta_logp_responses:
            rollouts[_START] = rollouts[_REFERENCE]
        elif self._start is not None:
            rollouts[_START] = self._start_logps(rollouts, self._start)
        return rollouts

    def _start_logps(self, rollouts: Rollouts, start: InitialPolicy) -> Tensor:
        """(B, T): log-probabilities at the start of training, of responses spread over the batch; NaN of others."""
        count = num_rows(rollouts)
        some = torch.linspace(0, count - 1, min(count, self.args.delta_logp_responses)).round().long()
        some = some.to(rollouts["completion_ids"].device)
        with start.restored():
            logps = self._logps_without_gradient(rows(rollouts, some))
        result = logps.new_full(rollouts["completion_ids"].shape, torch.nan)
        result[some] = logps
        return result

    def _refilled(self, rollouts: Rollouts, order: PromptOrder) -> Rollouts:
        """The rows of this process out of a batch of informative groups, as far as they could be found."""
        batch_size = self._batch_size
        wanted = batch_size // self.num_generations
        kept, left = self._sorted_out(rollouts)
        kept_batches, left_batches = [kept], [left]
        found, drawn, refills = num_rows(kept) // self.num_generations, wanted, 0
        while found < wanted and refills < self.args.max_refills:
            # TRL has to find whole groups in the rows of a process that are there several times.
            size = self.num_generations if self._sharing.copies == 1 else 1
            count = num_groups_to_draw(wanted - found, size, self._sharing.groups)
            more = super()._generate_and_score_completions(self._further_examples(order.take(count)))
            kept, left = self._sorted_out(more)
            kept_batches.append(kept)
            left_batches.append(left)
            found += num_rows(kept) // self.num_generations
            drawn += count
            refills += 1
        self._metrics["train"]["dynamic_sampling/dropped"].append(1 - found / drawn)
        self._metrics["train"]["dynamic_sampling/refills"].append(refills)
        if found < wanted:
            warnings.warn(
                f"dynamic sampling found {found} of {wanted} groups whose rewards differ after {refills} refills: the "
                "places of the others do not count in this batch",
                stacklevel=2,
            )
        everyone = joined([*kept_batches, *map(masked_out, left_batches)])
        everyone = rows(everyone, slice(batch_size))
        num_tokens = loss_mask(everyone).sum() * self._sharing.copies
        return rows(everyone, self._sharing.own_rows(batch_size)) | {TOKENS_IN_BATCH: num_tokens}

    def _sorted_out(self, rollouts: Rollouts) -> tuple[Rollouts, Rollouts]:
        """The rows of all processes whose group is informative, and the others."""
        rewards = self._sharing.once(self._rewards)
        informative = informative_groups(rewards, self.reward_weights, self.num_generations)
        index = informative.repeat_interleave(self.num_generations)
        everyone = gathered(rollouts, self._sharing)
        return rows(everyone, index), rows(everyone, ~index)

    def _further_examples(self, numbers: list[int]) -> list[dict[str, Any]]:
        """The rows that this process draws of further groups, as the data loader would give them."""
        examples = [self.train_dataset[number] for number in numbers for _ in range(self.num_generations)]
        # Copies of their own: TRL writes into them.
        return [dict(example) for example in examples[self._sharing.own_rows(len(examples))]]

    def _reweight_by_perplexity(self, rollouts: Rollouts) -> None:
        """`ppl` compares whole groups, which are parted among the optimiser's batches: it is done to all at once."""
        mask = loss_mask(rollouts).bool()
        if _OLD not in rollouts:
            rollouts[_OLD] = self._logps_without_gradient(rollouts)
        advantages, counts = rollouts["advantages"], mask.sum(1)
        local = torch.stack([grpo.log_perplexity(rollouts[_OLD], mask), advantages, counts.float()], 1)
        perplexity, advantage, count = self._sharing.once(self.accelerator.gather(local)).unbind(1)
        group = torch.arange(len(count), device=count.device) // self.num_generations
        alpha, sign = self.args.reweight_alpha, self.args.reweight_sign
        weights = grpo.perplexity_weight(perplexity, advantage, count, group, alpha, sign)
        weight = weights[self._sharing.own_rows(len(count))]
        rollouts["advantages"] = weight * advantages
        self._log_means(TokenSums({"reweight/mean_weight": ((weight * counts).sum(), counts.sum())}))

    @torch.no_grad()
    def _logps_without_gradient(self, rollouts: Rollouts) -> Tensor:
        logps, _, _ = self._get_per_token_logps_and_entropies(
            self.model, *model_inputs(rollouts), batch_size=self.args.per_device_train_batch_size
        )
        return logps

    # Loss

    def _compute_loss(self, model: Any, inputs: Rollouts) -> Tensor:
        mask = loss_mask(inputs)
        logp, entropy, _ = self._get_per_token_logps_and_entropies(model, *model_inputs(inputs), compute_entropy=True)
        old_logp = inputs.get(_OLD, logp.detach())
        entropy_mask = None
        if self.top_entropy_quantile < 1.0:
            entropy_mask = self.get_high_entropy_mask(entropy, mask, 1 - self.top_entropy_quantile)
        advantages, counts, options = inputs["advantages"], mask.bool(), self._options()
        accumulated = self.current_gradient_accumulation_steps if self.model.training else 1
        by_step = self.loss_type in _BY_STEP
        result = policy_loss(
            logp,
            old_logp,
            advantages,
            counts,
            entropy=entropy.detach(),
            token_weight=self._token_weight(inputs, logp, old_logp, mask, entropy_mask),
            num_tokens=self._tokens_of_step(inputs, accumulated) if by_step else None,
            **self._divergence(inputs, logp, old_logp, counts),
            **options,
        )
        loss = result.loss if by_step else result.loss / accumulated
        if self.entropy_coef:
            # As TRL: the mean over this batch, whatever the loss divides by.
            bonus = grpo.masked_mean(entropy, mask if entropy_mask is None else mask * entropy_mask)
            loss = loss - self.entropy_coef * bonus / accumulated
            self._log_entropy_bonus(result.loss)
        sums = policy_sums(result.metrics, mask.sum(), reweighted=self.args.reweight != "ppl", kl=self.beta != 0.0)
        clipped = grpo.clipped(logp.detach(), old_logp, advantages, counts, check_options(**options))
        add_clip_ratios(sums, *clipped, counts, cispo=self.loss_type == "cispo")
        if _START in inputs:
            start = inputs[_START]
            add_delta_logp(sums, logp.detach() - start, counts & ~start.isnan())
        self._log_means(sums)
        return loss

    def _options(self) -> dict[str, Any]:
        """Those of `policy_loss`."""
        return {
            "loss_type": self.loss_type,
            # With `ppl` responses were reweighted when they were drawn.
            "reweight": "none" if self.args.reweight == "ppl" else self.args.reweight,
            "reweight_sign": self.args.reweight_sign,
            "importance": self.importance_sampling_level,
            "alpha": self.args.reweight_alpha,
            "clip_low": self.epsilon_low,
            "clip_high": self.epsilon_high,
            "dual_clip": self.args.dual_clip,
            "kl_beta": self.beta,
            "sapo_temperature_pos": self.args.sapo_temperature_pos,
            "sapo_temperature_neg": self.args.sapo_temperature_neg,
            "max_length": self.max_completion_length,
        }

    def _divergence(self, inputs: Rollouts, logp: Tensor, old_logp: Tensor, mask: Tensor) -> dict[str, Any]:
        """What the loss is told of the reference model: by TRL's default a divergence that the ratio corrects."""
        if self.beta == 0.0:
            return {}
        if not self.args.use_bias_correction_kl:
            return {"ref_logp": inputs[_REFERENCE]}
        importance = self.importance_sampling_level
        return {"kl": grpo.divergence(logp, inputs[_REFERENCE], old_logp, mask, importance)}

    def _tokens_of_step(self, inputs: Rollouts, accumulated: int) -> Tensor:
        """Tokens of an optimiser step over the number of processes, whose gradients are averaged."""
        tokens = inputs[TOKENS_IN_BATCH].clamp(min=1.0) / self.accelerator.num_processes
        return tokens * accumulated / self._steps if self.model.training else tokens

    def _token_weight(
        self, inputs: Rollouts, logp: Tensor, old_logp: Tensor, mask: Tensor, entropy_mask: Tensor | None
    ) -> Tensor | None:
        """What TRL multiplies the loss of a token by, apart from its KL term."""
        factors = [] if entropy_mask is None else [entropy_mask]
        if self.off_policy_mask_threshold is not None:
            factors.append(
                self.get_off_policy_mask(
                    advantages=inputs["advantages"][:, None],
                    per_token_logps=logp,
                    sampling_per_token_logps=inputs.get("sampling_per_token_logps", old_logp),
                    mask=mask,
                    off_policy_threshold=self.off_policy_mask_threshold,
                )
            )
        if self.use_vllm and self.vllm_importance_sampling_correction:
            factors.append(inputs["importance_sampling_ratio"])
        return functools.reduce(torch.mul, factors, torch.ones_like(logp)).detach() if factors else None

    def _log_entropy_bonus(self, loss: Tensor) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["policy_loss"].append(self.accelerator.gather(loss.detach()).mean().item())
        if self.model.training and self.accelerator.sync_gradients:
            metrics["entropy_coef"].append(self.entropy_coef)

    def _log_means(self, sums: TokenSums) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in sums.means(self.accelerator).items():
            metrics[name].append(value)

    # Checkpoints

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._sampler = super()._get_train_sampler(dataset)
        return self._sampler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if not self.args.save_only_model:
            state = {
                "step": self._step,
                "rows_drawn": self._rows_drawn,
                "refill_position": 0 if self._refill_order is None else self._refill_order.position,
                "buffered": self._buffered_inputs if self._step % (self._steps * self.num_iterations) else None,
            }
            directory = self._get_output_dir(trial=trial)
            write_rollouts(directory, self.state.global_step, self.accelerator.process_index, state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # Under FSDP, which has sharded the parameters of the start by now.
        if model is not None:
            self._keep_start()
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self._sampler is not None and self.state.epoch is not None and self.args.shuffle_dataset:
            # The sampler shuffles anew in every epoch, from a generator that begins anew with this process.
            for _ in range(int(self.state.epoch)):
                torch.randperm(len(self.train_dataset), generator=self._sampler.generator)
        state = read_rollouts(checkpoint, self.accelerator.process_index, self.accelerator.device)
        if state is None:
            return
        self._step, self._rows_drawn = state["step"], state["rows_drawn"]
        self._buffered_inputs = state["buffered"]
        if self._refill_order is not None:
            self._refill_order.position = state["refill_position"]


def _tensor_parallel_size(model: Any) -> int:
    """How many processes have the model together; 1 of a name."""
    return getattr(model, "tp_size", None) or 1


def _is_function(reward: Any) -> bool:
    """Not a reward model, nor the name of one."""
    return callable(reward) and not isinstance(reward, torch.nn.Module)
