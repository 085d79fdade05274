"""Options of model, adapters, data, training loop and trackers."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

__all__ = [
    "AdapterConfig",
    "DataConfig",
    "DataSource",
    "ModelConfig",
    "ModelInit",
    "ModelKind",
    "NonFinite",
    "TrackerConfig",
    "TrackerName",
    "TrainerConfig",
    "WandbMode",
]


class ModelKind(Enum):
    """Whose model trains."""

    DECODER = "decoder"
    HF = "hf"
    MODULE = "module"


class ModelInit(Enum):
    """Where a run's first weights come from."""

    FRESH = "fresh"
    WEIGHTS = "weights"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """A decoder of the LLaMA family, a model of Hugging Face, or the user's own module."""

    name: str = "1m"
    """Label of the preset, for the record only."""
    kind: ModelKind = ModelKind.DECODER
    """DECODER: the built-in one, of the sizes below. HF: a causal language model of transformers, see ``path``. MODULE:
    any module that the function ``path`` returns."""
    path: str = ""
    """HF: directory with config.json, absolute. MODULE: ``package.module:function``, importable on every rank."""
    init: ModelInit = ModelInit.FRESH
    """Only for HF. FRESH draws the weights that the seed says; WEIGHTS takes the directory's safetensors. A run that is
    continued reads neither."""
    options: dict[str, Any] = field(default_factory=dict)
    """Only for MODULE: arguments of the function, ``model.options.depth=4``."""
    vocab_size: int = 259
    """Tokens: 256 bytes, <bos>, <eos>, <pad>."""
    d_model: int = 256
    """Width of the residual stream."""
    n_layers: int = 2
    """Decoder blocks."""
    n_heads: int = 4
    """Query heads; must divide d_model into even-sized heads."""
    n_kv_heads: int = 2
    """Key and value heads; must divide n_heads."""
    d_ff: int = 448
    """Hidden width of the SwiGLU."""
    max_seq_len: int = 1024
    """Longest sequence, tokens."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding's wavelengths."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Use the token embedding as output head."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""


@dataclass(kw_only=True, slots=True)
class AdapterConfig:
    """Train the adapters of one task on a frozen model instead of the whole model."""

    method: str = ""
    """Which adapter method, see ``holdfast adapt --list``; empty trains the whole model."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the method: ``adapter.options.rank=8`` for one of them, ``adapter.options={rank: 8}`` for several."""
    target_modules: list[str] = field(default_factory=lambda: ["wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"])
    """Linear layers by their names or the ends of these; ``["all-linear"]``; or one regular expression that begins
    with ^ and matches whole names."""
    base: str = ""
    """Safetensors file of the frozen weights, such as a run exports."""
    nf4: bool = False
    """Keep the frozen matrices that are adapted in 4 bits: a quarter to an eighth of the memory, and another base."""
    tasks: list[str] = field(default_factory=list)
    """Directories of the adapters of finished tasks, oldest first."""
    task: str = ""
    """Name of the task that is trained; letters, digits, '.', '_' and '-'."""
    in_memory: bool = True
    """Let the keepers hold base and finished tasks too, divided among nodes and coded like snapshots, so that a worker
    can come back when the files cannot be read any more. Takes their size on all nodes together, and parity."""
    seen: dict[str, Any] = field(default_factory=dict)
    """Text of earlier tasks by their names, read like ``data.path``: it is evaluated too at the end."""
    keep_best: bool = False
    """End with the best state that an evaluation has seen, every ``trainer.eval_every`` steps and at the last one,
    instead of the last state. It is part of every snapshot."""
    spike: float = 0.0
    """With keep_best: bits per byte above the best at which the task ends; 0 goes on unless they are no number."""
    patience: int = 0
    """With keep_best: evaluations in a row without improvement after which the task ends; 0 goes on."""
    directions: str = ""
    """Safetensors file of directions, a matrix for each layer, that the task stays out of. ``holdfast adapt`` makes
    one for each domain."""
    protected_directions: int = 0
    """Of ``holdfast adapt``: directions of each earlier domain, in each layer, that a new one stays out of, for methods
    with a ``projection``; 0 protects none."""
    router_prompts: int = 200
    """Of ``holdfast adapt``: pieces of each domain's text from whose outcomes a router is trained in the end, for
    methods whose tasks act apart or alone; 0 trains none."""
    domains: list[str] = field(default_factory=list)
    """Of ``holdfast adapt``: files or directories to learn one after the other, NAME:PATH or PATH, named after its
    last part."""
    rounds: int = 1
    """Of ``holdfast adapt``: tasks for each domain, each on top of those before it."""
    least_gain: float = 0.002
    """Of ``holdfast adapt``: bits per byte; a round that gains less is the last of its domain."""


class DataSource(Enum):
    """Where the text comes from."""

    LOCAL = "local"
    TEXT = "text"
    JSONL = "jsonl"
    PARQUET = "parquet"
    HF = "hf"


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The training text."""

    source: DataSource = DataSource.LOCAL
    """LOCAL: this interpreter's standard library and pydoc topics. TEXT, JSONL, PARQUET: ``path``. HF: a
    dataset of Hugging Face."""
    path: str = ""
    """File or directory (searched recursively) of the user's own text; .gz .bz2 .zst are read too. HF: a
    directory that ``save_to_disk`` made, one of files that ``datasets`` reads, or a name."""
    split: str = ""
    """Only for HF, which part of the dataset is read; empty means train. What is held out is a share of it."""
    field: str = "text"
    """JSON field or parquet column that holds the text."""
    tokenizer: str = ""
    """Directory with the tokenizer.json of Hugging Face, absolute; empty means bytes."""
    seq_len: int = 256
    """Tokens per training sequence."""
    validation_share: float = 0.05
    """Share of the files (rows, for a single file) held out, chosen by a hash of their name."""
    cache: str = ""
    """Directory of token stores; empty means ``<root>/cache``."""


class NonFinite(Enum):
    """What becomes of a step whose loss or gradient norm is NaN or infinite. FAIL: it is a fault. SKIP: all ranks go
    back to the newest state they hold and leave that step's update out."""

    FAIL = "fail"
    SKIP = "skip"


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    """The loop."""

    max_steps: int = 300
    """Optimizer steps to finish."""
    global_batch: int = 24
    """Sequences per optimizer step over all ranks; a multiple of micro_batch x ranks."""
    micro_batch: int = 8
    """Sequences per rank and forward pass."""
    nonfinite: NonFinite = NonFinite.FAIL
    """FAIL or SKIP."""
    max_nonfinite: int = 10
    """Steps that SKIP leaves out over the whole run; the next one is a fault."""
    log_every: int = 10
    """Steps between progress lines."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    eval_windows: int = 96
    """Validation sequences per evaluation."""
    generate_bytes: int = 200
    """Bytes of text generated at the end."""
    prompt: str = "def "
    """Start of the generated text."""


class TrackerName(Enum):
    """What follows the run besides the files in its directory."""

    NONE = "none"
    WANDB = "wandb"
    TENSORBOARD = "tensorboard"
    BOTH = "both"


class WandbMode(Enum):
    """AUTO is online with an API key and offline without."""

    AUTO = "auto"
    ONLINE = "online"
    OFFLINE = "offline"


@dataclass(kw_only=True, slots=True)
class TrackerConfig:
    """Experiment tracker; ``metrics.jsonl`` is written in any case."""

    name: TrackerName = TrackerName.NONE
    """NONE, WANDB, TENSORBOARD or BOTH."""
    mode: WandbMode = WandbMode.AUTO
    """Of W&B only."""
    entity: str = ""
    """W&B entity; empty means the account's default."""
    group: str = ""
    """W&B group; empty means the curriculum, else the name behind ``experiment=``, else none."""
    init_timeout_s: float = 90.0
    """Seconds to wait for W&B before falling back to offline."""
    finish_timeout_s: float = 30.0
    """Seconds the end of a run may wait for uploads."""
    alert_after_s: float = 600.0
    """Seconds without a finished step until W&B is told to alert."""
