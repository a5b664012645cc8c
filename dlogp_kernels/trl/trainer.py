"""TRL's GRPO trainer with the fused ops, reweighted advantages and DAPO's sampling."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from ..functional import policy_loss
from ..hf.heads import unwrapped
from ..hf.verify_head import verified_lm_head
from ..reference.policy import (
    PolicyOptions,
    clipped_places,
    k3,
    log_perplexity,
    normalized_in_group,
    ratio_of,
    raw_log_ratio,
    reweighting,
)
from ..report.files import replaced_atomically
from .config import ReweightedGRPOConfig
from .head import add_logp_head
from .initial_policy import InitialPolicy
from .metrics import TokenSums, add_clip_ratios, add_delta_logp, policy_sums
from .rewards import OVERLONG_PENALTY, checked, informative_groups, overlong_penalty, without_scores_unpenalised
from .rollout_generation import draw_responses
from .rollouts import (
    TOKENS_IN_BATCH,
    PromptOrder,
    Rollouts,
    gathered,
    joined,
    loss_mask,
    masked_out,
    num_groups_to_draw,
    repeated,
    rows,
)

_OLD, _REFERENCE, _START = "old_per_token_logps", "ref_per_token_logps", "start_per_token_logps"
#: Loss types whose denominator is the number of tokens of the whole optimiser step.
_BY_STEP = ("dapo", "cispo")


class ReweightedGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` whose log-probabilities, entropies and loss come from the fused ops, without a logit tensor.

    It takes what TRL's trainer takes, with a `ReweightedGRPOConfig`; with `reweight="none"` it trains as TRL's does.
    PEFT, gradient accumulation, gradient checkpointing, DDP and mixed precision work as there.

    It logs all that TRL's trainer logs, and `clip_ratio/*` whatever the loss. Beside that, as means over tokens of all
    processes: `reweight/mean_weight`, `clip_ratio/dual_mean`, `approx_kl`, `ratio/mean`, `ratio/max`, and of Δlog p to
    the policy at the start of training `delta_logp/mean`, `delta_logp/min`, `delta_logp/max` and the shares of tokens
    in the tails, `delta_logp/below_-1` and `delta_logp/above_0.25`. With dynamic sampling: `dynamic_sampling/dropped`,
    the share of groups, and `dynamic_sampling/refills`.

    A checkpoint also holds the responses that are still to be learned from, so that a run that was stopped at any
    step and resumed has the losses of one that was not.

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
        if args.delta_logp_responses and not self._reference_is_start:
            self._start = InitialPolicy(self.model)

    def _check_supported(self) -> None:
        if self._is_vlm:
            raise TypeError("processing_class is a processor of images, expected a tokenizer: models of text alone")
        if self.aux_loss_enabled:
            raise ValueError(
                f"router_aux_loss_coef is {self.router_aux_loss_coef}, expected 0: the auxiliary loss of a mixture of "
                "experts is not supported"
            )
        if self._dist.is_zero3:
            raise ValueError("DeepSpeed ZeRO-3 shards the weight of the last layer, expected stage 2 or lower, or FSDP")
        if (self._dist.is_fsdp or self.is_deepspeed_enabled) and self.args.delta_logp_responses:
            raise ValueError(
                f"delta_logp_responses is {self.args.delta_logp_responses} with parameters held by FSDP or DeepSpeed, "
                "expected 0: the policy at the start of training is kept as a copy of whole parameters"
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
        if self.args.rollout_seed is None or not self.model.training:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        first = self._rows_drawn + self.accelerator.process_index * len(prompt_ids)
        self._rows_drawn += self.accelerator.num_processes * len(prompt_ids)
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
        count = _num_rows(rollouts)
        some = torch.linspace(0, count - 1, min(count, self.args.delta_logp_responses)).round().long()
        some = some.to(rollouts["completion_ids"].device)
        with start.restored():
            logps = self._logps_without_gradient(rows(rollouts, some))
        result = logps.new_full(rollouts["completion_ids"].shape, torch.nan)
        result[some] = logps
        return result

    def _refilled(self, rollouts: Rollouts, order: PromptOrder) -> Rollouts:
        """The rows of this process out of a batch of informative groups, as far as they could be found."""
        batch_size, processes = self._batch_size, self.accelerator.num_processes
        wanted = batch_size // self.num_generations
        kept, left = self._sorted_out(rollouts)
        found, drawn, refills = _num_rows(kept) // self.num_generations, wanted, 0
        batches, rest = [kept], [left]
        while found < wanted and refills < self.args.max_refills:
            count = num_groups_to_draw(wanted - found, self.num_generations, processes)
            more = super()._generate_and_score_completions(self._further_examples(order.take(count)))
            kept, left = self._sorted_out(more)
            batches.append(kept)
            rest.append(left)
            found += _num_rows(kept) // self.num_generations
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
        padding = self._tokenizer.pad_token_id
        everyone = joined([*batches, masked_out(joined(rest, padding))], padding)
        everyone = rows(everyone, slice(batch_size))
        local = batch_size // processes
        begin = self.accelerator.process_index * local
        return rows(everyone, slice(begin, begin + local)) | {TOKENS_IN_BATCH: loss_mask(everyone).sum()}

    def _sorted_out(self, rollouts: Rollouts) -> tuple[Rollouts, Rollouts]:
        """The rows of all processes whose group is informative, and the others."""
        informative = informative_groups(self._rewards, self.reward_weights, self.num_generations)
        index = informative.repeat_interleave(self.num_generations)
        everyone = gathered(rollouts, self.accelerator, self._tokenizer.pad_token_id)
        return rows(everyone, index), rows(everyone, ~index)

    def _further_examples(self, numbers: list[int]) -> list[dict[str, Any]]:
        """The rows that this process draws of further groups, as the data loader would give them."""
        examples = repeated([self.train_dataset[number] for number in numbers], self.num_generations)
        local = len(examples) // self.accelerator.num_processes
        begin = self.accelerator.process_index * local
        return examples[begin : begin + local]

    def _reweight_by_perplexity(self, rollouts: Rollouts) -> None:
        """`ppl` compares whole groups, which are parted among the optimiser's batches: it is done to all at once."""
        mask = loss_mask(rollouts).bool()
        if _OLD not in rollouts:
            rollouts[_OLD] = self._logps_without_gradient(rollouts)
        local = torch.stack([log_perplexity(rollouts[_OLD], mask), mask.sum(1).to(torch.float32)], 1)
        everyone = self.accelerator.gather(local)
        group = torch.arange(len(everyone), device=everyone.device) // self.num_generations
        s = normalized_in_group(everyone[:, 0], group, everyone[:, 1] > 0)
        begin = self.accelerator.process_index * len(local)
        options = PolicyOptions(reweight="ppl", alpha=self.args.reweight_alpha, reweight_sign=self.args.reweight_sign)
        advantages = rollouts["advantages"]
        weight = reweighting(
            rollouts[_OLD][:, :1], advantages[:, None], s[begin : begin + len(local), None], options
        ).squeeze(1)
        rollouts["advantages"] = weight * advantages
        sums = TokenSums()
        sums.add("reweight/mean_weight", (weight * local[:, 1]).sum(), local[:, 1].sum())
        self._log_means(sums)

    @torch.no_grad()
    def _logps_without_gradient(self, rollouts: Rollouts) -> Tensor:
        logps, _, _ = self._get_per_token_logps_and_entropies(
            self.model, *_model_inputs(rollouts), batch_size=self.args.per_device_train_batch_size
        )
        return logps

    # Loss

    def _compute_loss(self, model: Any, inputs: Rollouts) -> Tensor:
        mask = loss_mask(inputs)
        logp, entropy, _ = self._get_per_token_logps_and_entropies(model, *_model_inputs(inputs), compute_entropy=True)
        old_logp = inputs.get(_OLD, logp.detach())
        entropy_mask = None
        if self.top_entropy_quantile < 1.0:
            entropy_mask = self.get_high_entropy_mask(entropy, mask, 1 - self.top_entropy_quantile)
        divergence = self._divergence(inputs, logp, old_logp, mask)
        training = self.model.training
        accumulated = self.current_gradient_accumulation_steps if training else 1
        by_step = self.loss_type in _BY_STEP
        result = policy_loss(
            logp,
            old_logp,
            inputs["advantages"],
            mask.bool(),
            loss_type=self.loss_type,
            reweight="none" if self.args.reweight == "ppl" else self.args.reweight,
            alpha=self.args.reweight_alpha,
            reweight_sign=self.args.reweight_sign,
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            dual_clip=self.args.dual_clip,
            importance=self.importance_sampling_level,
            kl=divergence,
            kl_beta=self.beta,
            token_weight=self._token_weight(inputs, logp, old_logp, mask, entropy_mask),
            num_tokens=self._tokens_of_step(inputs, accumulated) if by_step else None,
            max_length=self.max_completion_length,
            sapo_temperature_pos=self.args.sapo_temperature_pos,
            sapo_temperature_neg=self.args.sapo_temperature_neg,
        )
        loss = result.loss if by_step else result.loss / accumulated
        if self.entropy_coef:
            self._metrics["train" if training else "eval"]["policy_loss"].append(
                self.accelerator.gather(result.loss.detach()).mean().item()
            )
            # As TRL: the mean over this batch, whatever the loss divides by.
            bonus_mask = mask if entropy_mask is None else mask * entropy_mask
            bonus = (entropy * bonus_mask).sum() / bonus_mask.sum().clamp(min=1.0)
            loss = loss - self.entropy_coef * bonus / accumulated
            if training and self.accelerator.sync_gradients:
                self._metrics["train"]["entropy_coef"].append(self.entropy_coef)
        sums = policy_sums(result.metrics, mask.sum(), reweighted=self.args.reweight != "ppl")
        self._add_clip_ratios(sums, logp.detach(), old_logp, inputs["advantages"], mask.bool())
        sums.add("entropy", (entropy.detach() * mask).sum(), mask.sum())
        if divergence is not None:
            sums.add("kl", (divergence.detach() * mask).sum(), mask.sum())
        if _START in inputs:
            start = inputs[_START]
            add_delta_logp(sums, logp.detach() - start, mask.bool() & ~start.isnan())
        self._log_means(sums)
        return loss

    def _add_clip_ratios(
        self, sums: TokenSums, logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor
    ) -> None:
        level = "token" if self.importance_sampling_level == "token" else "sequence"
        ratio = ratio_of(raw_log_ratio(logp, old_logp, mask, level))
        options = PolicyOptions(
            loss_type=self.loss_type,
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            dual_clip=math.inf if self.args.dual_clip is None else self.args.dual_clip,
        )
        places = clipped_places(ratio, advantages[:, None].expand_as(ratio), options)
        add_clip_ratios(sums, *places, mask, cispo=self.loss_type == "cispo")

    def _divergence(self, inputs: Rollouts, logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor | None:
        """k3 of each token to the reference model (B, T), times the token's ratio as TRL's default has it."""
        if self.beta == 0.0:
            return None
        divergence = k3(inputs[_REFERENCE] - logp)
        if self.args.use_bias_correction_kl:
            ratio = ratio_of(raw_log_ratio(logp, old_logp, mask.bool(), self.importance_sampling_level))
            divergence = divergence * ratio
        return divergence

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
        if not factors:
            return None
        weight = torch.ones_like(logp)
        for factor in factors:
            weight = weight * factor
        return weight.detach()

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
            directory = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            state = {
                "step": self._step,
                "rows_drawn": self._rows_drawn,
                "refill_position": 0 if self._refill_order is None else self._refill_order.position,
                "buffered": self._buffered_inputs if self._step % self._steps_per_rollout() else None,
            }
            # The last file of a checkpoint: where it is, the checkpoint is complete.
            with replaced_atomically(directory / rollouts_file(self.accelerator.process_index)) as temporary:
                torch.save(state, temporary)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self._sampler is not None and self.state.epoch is not None and self.args.shuffle_dataset:
            # The sampler shuffles anew in every epoch, from a generator that begins anew with this process.
            for _ in range(int(self.state.epoch)):
                torch.randperm(len(self.train_dataset), generator=self._sampler.generator)
        path = Path(checkpoint) / rollouts_file(self.accelerator.process_index)
        if not path.exists():  # a checkpoint of TRL's own trainer
            return
        state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
        self._step, self._rows_drawn = state["step"], state["rows_drawn"]
        self._buffered_inputs = state["buffered"]
        if self._refill_order is not None:
            self._refill_order.position = state["refill_position"]

    def _steps_per_rollout(self) -> int:
        return self._steps * self.num_iterations


def rollouts_file(process_index: int) -> str:
    """In a checkpoint: the responses that this process has still to learn from."""
    return f"rollouts_{process_index}.pt"


def complete_checkpoints(directory: str | Path) -> dict[int, Path]:
    """The checkpoints in a trainer's output directory that were written to their end, by step."""
    found = {}
    for path in Path(directory).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (path / rollouts_file(0)).exists():
            found[int(path.name.rpartition("-")[2])] = path
    return found


def _is_function(reward: Any) -> bool:
    """Not a reward model, nor the name of one."""
    return callable(reward) and not isinstance(reward, torch.nn.Module)


def _num_rows(rollouts: Rollouts) -> int:
    return len(rollouts["completion_ids"])


def _model_inputs(rollouts: Rollouts) -> tuple[Tensor, Tensor, int]:
    """Token ids and attention mask of prompts and responses (B, P + T), and T."""
    input_ids = torch.cat([rollouts["prompt_ids"], rollouts["completion_ids"]], 1)
    attention_mask = torch.cat([rollouts["prompt_mask"], rollouts["completion_mask"]], 1)
    return input_ids, attention_mask, rollouts["completion_ids"].shape[1]
