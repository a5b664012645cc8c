"""Every schema string of the library, once.

N tokens lie in the leading dimensions, at least one, of hidden (…, D) and logits (…, V); weight is (V, D). Targets
are flat, (N, K) int64, and so are outputs: `logp`-like ones are (N, K), the others (N,). In a backward op a gradient
that is None counts as zero, and `output_mask` says which gradients to compute, in the order of the floating inputs; the
others come back empty. Sampling has no gradient; its seed (64 bits, as int64) and step come as numbers, or from the
device as int64 tensors, seed (1,), step (1,) or (N,), which then count; row_id is (N,) int64, or None for 0 … N − 1.

The policy loss takes tokens (B, T), or (N,) with the offsets (B + 1,) int64 of B sequences; advantage is of each token
or (B,), mask bool, group (B,) int64, denominator () of the dtype of the loss: num_tokens or num_sequences; choices and
numbers are those options of reference_policy.PolicyOptions, in its order (PyTorch's time for a call goes by the square
of the number of arguments).
Its forward op leaves `coefficient`, the shape of logp, empty unless with_gradient, and `scale` (B,): the gradient by
logp is their product. metrics are in the order of PolicyMetrics.

The linear policy loss takes target (N, 1) and the rows of reference.rows.PolicyRows, (N,) of the dtype of the loss. Its
forward op leaves the gradients of the loss that output_mask asks for in that dtype, float32 or float64, whatever the
inputs' is: they are rounded once, when backward has multiplied them.

A backend other than plain PyTorch implements a private copy of each schema, `_<backend>_<op>`, with one more argument,
the workspace in bytes; `backends.py` chooses between them.
"""

_ONE_MODEL_OPTIONS = "float temperature, float? softcap, float logit_scale, int ignore_index"
_PAIR_OPTIONS = (
    "float temperature, float? softcap, float? base_softcap, float logit_scale, float base_logit_scale, "
    "int ignore_index"
)
_LINEAR_INPUTS = "Tensor hidden, Tensor weight, Tensor target, Tensor? bias"
_LINEAR_PAIR_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor base_hidden, Tensor base_weight, Tensor target, "
    "Tensor? bias, Tensor? base_bias"
)
_ONE_MODEL_GRADIENTS = "Tensor? grad_logp, Tensor? grad_entropy, Tensor? grad_lse"
_PAIR_GRADIENTS = (
    "Tensor? grad_logp, Tensor? grad_base_logp, Tensor? grad_entropy, Tensor? grad_base_entropy, "
    "Tensor? grad_kl, Tensor? grad_reverse_kl, Tensor? grad_lse, Tensor? grad_base_lse"
)
_LINEAR_SAMPLE_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor base_hidden, Tensor base_weight, Tensor? bias, Tensor? base_bias, "
    "float? softcap, float? base_softcap, float logit_scale, float base_logit_scale"
)
_SAMPLE_OPTIONS = (
    "Tensor? row_id, int seed, int step, Tensor? seed_tensor, Tensor? step_tensor, float gamma, str criterion, "
    "float? threshold, str draft, float temperature, int top_k, float top_p, float min_p"
)
_POLICY_TOKENS = (
    "Tensor logp, Tensor old_logp, Tensor advantage, Tensor mask, Tensor? offsets, Tensor? group, Tensor? ref_logp, "
    "Tensor? entropy, Tensor? kl, Tensor? token_weight, Tensor? denominator"
)
_POLICY_OPTIONS = "str[] choices, float[] numbers, int? max_length"
_POLICY_ROWS = (
    "Tensor old_logp, Tensor advantage, Tensor scale, Tensor? score, Tensor? ref_logp, Tensor? token_weight, "
    "str[] choices, float[] numbers"
)
_ONE_MODEL_SAVED = "Tensor entropy, Tensor lse"
_PAIR_SAVED = "Tensor entropy, Tensor base_entropy, Tensor kl, Tensor reverse_kl, Tensor lse, Tensor base_lse"
_SAMPLE = "(Tensor token, Tensor draft_token, Tensor selected, Tensor delta_logp, Tensor logp, Tensor base_logp)"
_ONE_MODEL_STATS = "(Tensor logp, Tensor entropy, Tensor lse)"
_PAIR_STATS = (
    "(Tensor delta_logp, Tensor logp, Tensor base_logp, Tensor entropy, Tensor base_entropy, "
    "Tensor kl, Tensor reverse_kl, Tensor lse, Tensor base_lse)"
)

#: op name → (arguments, returns)
SCHEMAS: dict[str, tuple[str, str]] = {
    "linear_logp_fwd": (f"{_LINEAR_INPUTS}, {_ONE_MODEL_OPTIONS}", _ONE_MODEL_STATS),
    "linear_logp_bwd": (
        f"{_ONE_MODEL_GRADIENTS}, {_LINEAR_INPUTS}, {_ONE_MODEL_SAVED}, {_ONE_MODEL_OPTIONS}, bool[3] output_mask",
        "(Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    ),
    "linear_delta_logp_fwd": (f"{_LINEAR_PAIR_INPUTS}, {_PAIR_OPTIONS}", _PAIR_STATS),
    "linear_delta_logp_bwd": (
        f"{_PAIR_GRADIENTS}, {_LINEAR_PAIR_INPUTS}, {_PAIR_SAVED}, {_PAIR_OPTIONS}, bool[6] output_mask",
        "(Tensor grad_hidden, Tensor grad_weight, Tensor grad_base_hidden, Tensor grad_base_weight, "
        "Tensor grad_bias, Tensor grad_base_bias)",
    ),
    "logp_fwd": (f"Tensor logits, Tensor target, {_ONE_MODEL_OPTIONS}", _ONE_MODEL_STATS),
    "logp_bwd": (
        f"{_ONE_MODEL_GRADIENTS}, Tensor logits, Tensor target, {_ONE_MODEL_SAVED}, {_ONE_MODEL_OPTIONS}",
        "Tensor grad_logits",
    ),
    "delta_logp_fwd": (f"Tensor logits, Tensor base_logits, Tensor target, {_PAIR_OPTIONS}", _PAIR_STATS),
    "delta_logp_bwd": (
        f"{_PAIR_GRADIENTS}, Tensor logits, Tensor base_logits, Tensor target, {_PAIR_SAVED}, {_PAIR_OPTIONS}, "
        "bool[2] output_mask",
        "(Tensor grad_logits, Tensor grad_base_logits)",
    ),
    "extrapolated_sample": (f"Tensor logits, Tensor base_logits, {_SAMPLE_OPTIONS}", _SAMPLE),
    "linear_extrapolated_sample": (f"{_LINEAR_SAMPLE_INPUTS}, {_SAMPLE_OPTIONS}", _SAMPLE),
    "policy_loss_fwd": (
        f"{_POLICY_TOKENS}, {_POLICY_OPTIONS}, bool with_gradient",
        "(Tensor loss, Tensor metrics, Tensor coefficient, Tensor scale)",
    ),
    "policy_loss_bwd": (
        "Tensor grad_loss, Tensor coefficient, Tensor scale, Tensor mask, Tensor? offsets, float entropy_coef, "
        "float kl_beta, bool[3] output_mask",
        "(Tensor grad_logp, Tensor grad_entropy, Tensor grad_kl)",
    ),
    "linear_policy_loss_fwd": (
        f"{_LINEAR_INPUTS}, Tensor? base_hidden, Tensor? base_weight, Tensor? base_bias, {_POLICY_ROWS}, "
        f"{_PAIR_OPTIONS}, bool[3] output_mask",
        "(Tensor loss, Tensor metrics, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    ),
    "linear_policy_loss_bwd": (
        "Tensor grad_loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, ScalarType hidden_dtype, "
        "ScalarType weight_dtype, ScalarType bias_dtype, bool[3] output_mask",
        "(Tensor scaled_hidden, Tensor scaled_weight, Tensor scaled_bias)",
    ),
}


def public_schema(op: str) -> str:
    arguments, returns = SCHEMAS[op]
    return f"{op}({arguments}) -> {returns}"


def backend_schema(backend: str, op: str) -> str:
    arguments, returns = SCHEMAS[op]
    return f"_{backend}_{op}({arguments}, int workspace) -> {returns}"
