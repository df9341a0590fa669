"""A whole decode step of Qwen3's four dense shapes with random weights, beside its floor and its parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from bench.decode.attention import work_of
from bench.decode.beside import HEAD_DIM, KV_HEADS
from bench.decode.pages import KINDS, KvMemory, random_kv
from bench.decode.timing import Work, microseconds
from hma_serve.core.model_config import ModelConfig
from hma_serve.decode.kernels.attention_call import AttentionWork, QueryOperand, StepRows, queries_at_once
from hma_serve.decode.kernels.step_model import StepMemory, StepModel
from hma_serve.model import tensor_shapes

PEAK = 790e12
"""BF16 operations per second, the best reading of a large product on this kind of GPU."""

SHAPES = {
    "4B": (2560, 36, 32, 9728),
    "8B": (4096, 36, 32, 12288),
    "14B": (5120, 40, 40, 17408),
    "32B": (5120, 64, 64, 25600),
}
"""Hidden size, layers, heads and width of the MLP; 8 KV heads of 128, vocabulary 151,936; 4B ties its head."""

ROWS = {
    "4B": ((1, 1024), (1, 4096), (1, 16384), (8, 4096), (32, 1024), (32, 4096), (128, 1024)),
    "8B": (
        (1, 1024), (1, 4096), (8, 4096), (32, 1024), (32, 4096), (32, 16384), (128, 1024), (128, 4096),
    ),
    "14B": ((1, 1024), (1, 4096), (1, 16384), (8, 4096), (32, 1024), (32, 4096), (128, 1024)),
    "32B": ((1, 1024), (1, 4096), (1, 16384), (8, 4096), (32, 1024), (32, 4096), (128, 1024)),
}  # fmt: skip
"""Sequences and packed tokens of each."""

EXTENDED = ((1, 4096), (8, 4096), (32, 4096), (8, 16384))
EXTEND_TOKENS = 32
"""The same for steps with an extend, and its query tokens."""

VLLM_BF16 = {
    ("4B", 1, 1024): 3.682, ("4B", 1, 4096): 3.784, ("4B", 1, 16384): 4.253, ("4B", 8, 4096): 4.846,
    ("4B", 32, 1024): 5.037, ("4B", 32, 4096): 8.367, ("4B", 128, 1024): 9.257,
    ("8B", 1, 1024): 5.2566, ("8B", 1, 4096): 5.4117, ("8B", 8, 4096): 6.5797, ("8B", 32, 1024): 6.6446,
    ("8B", 32, 4096): 9.8666, ("8B", 32, 16384): 21.6829, ("8B", 128, 1024): 11.669, ("8B", 128, 4096): 23.8328,
    ("14B", 1, 1024): 8.623, ("14B", 1, 4096): 8.819, ("14B", 1, 16384): 9.351, ("14B", 8, 4096): 10.05,
    ("14B", 32, 1024): 10.112, ("14B", 32, 4096): 13.711, ("14B", 128, 1024): 16.888,
    ("32B", 1, 1024): 18.985, ("32B", 1, 4096): 19.193, ("32B", 1, 16384): 19.955, ("32B", 8, 4096): 21.499,
    ("32B", 32, 1024): 21.553, ("32B", 32, 4096): 27.349, ("32B", 128, 1024): 30.798,
}  # fmt: skip
VLLM_FP8 = {
    ("8B", 1, 1024): 5.4314, ("8B", 1, 4096): 5.5085, ("8B", 8, 4096): 6.4063, ("8B", 32, 1024): 6.4628,
    ("8B", 32, 4096): 8.9965, ("8B", 32, 16384): 16.9352, ("8B", 128, 1024): 10.4332, ("8B", 128, 4096): 20.6799,
}  # fmt: skip
"""Milliseconds of vLLM 0.26 on one H200 (2026-11-23, torch 2.11, random weights, CUDA graphs) by model, sequences and
tokens of each, with BF16 KV and, for the 8B alone, with FP8 KV."""


@dataclass(frozen=True)
class StepRow:
    """One measurement; milliseconds.

    Attributes:
        model: Which shape.
        page_format: Of the packed prompts; `bf16`: they were materialised.
        batch: Sequences.
        context: Packed tokens of each.
        ms: The step: embedding to the likeliest token.
        gemm_ms: Its products alone.
        attention_ms: Its attention alone.
        floor_ms: Weights or operations, and KV, at the copy bandwidth of the run.
        vllm_ms: On an H200; see `vllm_ms`.
        kv_gb: HBM that the packed KV takes.
    """

    model: str
    page_format: str
    batch: int
    context: int
    ms: float
    gemm_ms: float
    attention_ms: float
    floor_ms: float
    vllm_ms: float | None
    kv_gb: float

    @property
    def rest(self) -> float:
        """Share of what is neither."""
        return 1 - (self.gemm_ms + self.attention_ms) / self.ms


@dataclass(frozen=True)
class ExtendStepRow:
    """A step of the 8B in which every sequence computes a token and one of them the last tokens of its prompt.

    Attributes:
        batch: Sequences.
        context: Packed tokens of each.
        tokens: Query tokens of the one.
        without_ms: Milliseconds of the step without these.
        together_ms: With them, read together as the runner does.
        each_ms: With them, each reading all pages for itself.
    """

    batch: int
    context: int
    tokens: int
    without_ms: float
    together_ms: float
    each_ms: float


class RandomWeights(Mapping[str, torch.Tensor]):
    """Drawn when asked for."""

    def __init__(self, config: ModelConfig) -> None:
        self._shapes = tensor_shapes(config)

    def __getitem__(self, name: str) -> torch.Tensor:
        size = self._shapes[name]
        noise = torch.empty(size, dtype=torch.bfloat16, device="cuda").normal_()
        return 1 + 0.1 * noise if len(size) == 1 else noise.mul_(size[-1] ** -0.5)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def config_of(model: str) -> ModelConfig:
    hidden, layers, heads, intermediate = SHAPES[model]
    return ModelConfig(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=40960,
        tie_word_embeddings=model == "4B",
        dtype="bfloat16",
    )


def fits(model: str, page_format: str, batch: int, context: int, *, models: int = 1) -> bool:
    """Whether the weights of so many models and KV leave 4 GB of this GPU for the rest."""
    config = config_of(model)
    per_token = config.kv_bytes_per_token * (0.53125 if KINDS[page_format] else 1.0)
    needed = 2 * models * config.parameter_count + batch * (context * per_token + 64 * config.kv_bytes_per_token)
    return needed + 4e9 < torch.cuda.get_device_properties(0).total_memory


def vllm_ms(model: str, page_format: str, batch: int, context: int) -> float | None:
    """vLLM's step of the matching KV: BF16 for materialised, the better of what was measured for packed."""
    tables = (VLLM_BF16,) if page_format == "bf16" else (VLLM_BF16, VLLM_FP8)
    return min((table[key] for table in tables if (key := (model, batch, context)) in table), default=None)


def measure(copy: float, model: str) -> Iterator[StepRow]:
    """All rows of a model that fit this GPU, with packed and with materialised KV."""
    wanted = [(name, *row) for name in ("tt_bfp8_b", "bf16") for row in ROWS[model] if fits(model, name, *row)]
    if not wanted:
        return
    config = config_of(model)
    step = StepModel(config, RandomWeights(config))
    gemms: dict[int, float] = {}
    for page_format, batch, context in wanted:
        kv = random_kv(KINDS[page_format], [context] * batch, config.num_layers, KV_HEADS, HEAD_DIM)
        if batch not in gemms:
            gemms[batch] = products_ms(step, batch)
        whole, attention = _step_ms(step, kv, batch)
        weights = 2 * (
            config.parameter_count - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
        )
        floor = max(weights / copy, weights * batch / PEAK) + kv.read_bytes * config.num_layers / copy
        yield StepRow(
            model,
            page_format,
            batch,
            context,
            whole,
            gemms[batch],
            attention,
            floor * 1e3,
            vllm_ms(model, page_format, batch, context),
            kv.layers.numel() * 4 / 1e9,
        )
        del kv
        torch.cuda.empty_cache()


def _step_ms(step: StepModel, kv: KvMemory, batch: int) -> tuple[float, float]:
    """The step, and its attention alone."""
    config = step.config
    rows = kv.rows()
    work = work_of(config.group_size, rows)
    pages = [kv.pages(layer) for layer in range(config.num_layers)]
    query = QueryOperand.of(torch.randn(batch, config.num_heads, HEAD_DIM, device="cuda").bfloat16())
    out = torch.empty(batch, config.num_heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)

    def attention() -> None:
        for layer in pages:
            work.attend(query, layer, out, scale=HEAD_DIM**-0.5, overlap=True)

    with torch.inference_mode():
        return whole_ms(step, kv, rows, [work]), microseconds([attention]) / 1e3


def whole_ms(step: StepModel, kv: KvMemory, rows: StepRows, works: list[AttentionWork]) -> float:
    """The step, embedding to the likeliest token."""
    count, config = len(rows.slot), step.config
    pages = [kv.pages(layer) for layer in range(config.num_layers)]
    token = torch.randint(0, config.vocab_size, (count,), dtype=torch.int32, device="cuda")
    # The last row of every sequence is sampled.
    chosen = torch.unique_consecutive(rows.slot, return_counts=True)[1].cumsum(0) - 1
    memory = StepMemory(token, torch.zeros(count, dtype=torch.int64, device="cuda"), chosen, rows)

    def whole() -> None:
        step.run(memory, [pages] * len(works), works).argmax(-1)

    with torch.inference_mode():
        return microseconds([whole]) / 1e3


def measure_extends() -> Iterator[ExtendStepRow]:
    """Steps of the 8B, in which one sequence computes the last tokens of its prompt."""
    config = config_of("8B")
    step = StepModel(config, RandomWeights(config))
    group, queries = config.group_size, queries_at_once(config.group_size)
    for batch, context in EXTENDED:
        kv = random_kv(KINDS["tt_bfp8_b"], [context] * batch, config.num_layers, KV_HEADS, HEAD_DIM, EXTEND_TOKENS)
        single = kv.rows()
        without = whole_ms(step, kv, single, [work_of(group, single)])
        counts = [*([1] * (batch - 1)), EXTEND_TOKENS]
        each = kv.rows(counts)
        by_each = whole_ms(step, kv, each, [work_of(group, each)])
        rows = kv.rows(counts, queries)
        rows.kind[batch - 1 :] = 1
        works = [work_of(group, rows), work_of(group, rows, 1, queries=queries)]
        yield ExtendStepRow(batch, context, EXTEND_TOKENS, without, whole_ms(step, kv, rows, works), by_each)
        del kv
        torch.cuda.empty_cache()


def products_ms(step: StepModel, batch: int) -> float:
    """All products of a step, one after the other."""
    inputs: dict[int, torch.Tensor] = {}

    def product(weight: torch.Tensor) -> Work:
        width = weight.shape[1]
        x = inputs.setdefault(width, torch.randn(batch, width, device="cuda").bfloat16())
        return lambda: step.multiply(x, weight)

    works = [product(weight) for weight in step.matrices()]

    def all_of_them() -> None:
        for work in works:
            work()

    with torch.inference_mode():
        return microseconds([all_of_them]) / 1e3
